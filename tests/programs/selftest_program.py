"""Two ranks that run the self-test; the second has a broken kernel: `selftest_program.py DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from broken_kernels import BROKEN, SOUND, many_rows, vendor
from forked import run_ranks

from mesh.invariant.selftest import self_test
from mesh.invariant.switch import batch_invariant, current

CPU = torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    broken = many_rows if dist.get_rank() == 1 else lambda a, result: False
    with vendor("mm", broken), batch_invariant(True, "cpu"):
        line = self_test([SOUND, BROKEN], (8,), (1,), torch.float32, CPU, dist.group.WORLD)
        Path(sys.argv[1], str(dist.get_rank())).write_text(
            f"{line} {sorted(current().choices.tiled)}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(2, main)
