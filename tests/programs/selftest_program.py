"""Two ranks that run the self-test: `selftest_program.py DIR`; the second has a broken kernel.

The second is a fork of the first: a fresh process, unlike one that runs tests, has no threads yet.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from broken_kernels import BROKEN, SOUND, many_rows, vendor

from mesh.invariant.selftest import self_test
from mesh.invariant.switch import batch_invariant, current

CPU = torch.device("cpu")


def rank_of_two(rank: int, path: Path) -> None:
    """A rank of a world of two, of which the second has the broken kernel."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(path / "store"), 2), rank=rank,
                            world_size=2)  # fmt: skip
    broken = many_rows if rank == 1 else lambda a, result: False
    with vendor("mm", broken), batch_invariant(True, "cpu"):
        line = self_test(
            [SOUND, BROKEN], (8,), (1,), torch.float32, torch.device("cpu"), dist.group.WORLD
        )
        (path / str(rank)).write_text(f"{line} {sorted(current().choices.tiled)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    other = multiprocessing.get_context("fork").Process(
        target=rank_of_two, args=(1, Path(sys.argv[1])), daemon=True
    )
    other.start()
    rank_of_two(0, Path(sys.argv[1]))
    other.join()
