"""recipes/grpo.py twice in the same processes, the second time ended by kill -9.

`torchrun killed_program.py UNINTERRUPTED KILLED STEP WORD...` takes two run directories. In the
second the rank that writes the best model of STEP dies when half of the weights are on the disk.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from mesh.model import hf
from mesh.recipes.grpo import main

write_shard = hf._write_shard


def write_half(path: Path, number: int, tensors: dict[str, Any]) -> Path:
    file = write_shard(path, number, tensors)
    if path == Path(sys.argv[2], "best", f"step-{sys.argv[3]}.partial"):
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return file


if __name__ == "__main__":
    hf._write_shard = write_half
    for attempt, run_dir in enumerate(sys.argv[1:3]):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # keys of its own in the store
        main([*sys.argv[4:], f"run_dir={run_dir}"])
