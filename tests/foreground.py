"""A recipe as a terminal's foreground job, to be watched, stopped and killed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launching import REPOSITORY, TORCHRUN

from mesh.lifecycle.ending import alive


class Foreground:
    """A recipe as a terminal's foreground job: a process group of its own. more: torchrun's."""

    def __init__(
        self, recipe: str, num_ranks: int, *words: str, more: Sequence[str] = (), **options
    ):
        launcher = [*TORCHRUN, f"--nproc-per-node={num_ranks}", *more] if num_ranks > 1 else []
        self.num_ranks = num_ranks
        places = (str(REPOSITORY), str(REPOSITORY / "tests"))
        self.popen = subprocess.Popen(
            [*(launcher or [sys.executable]), str(REPOSITORY / "recipes" / recipe), *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def ranks(self) -> list[int]:
        """Process ids of the ranks: torchrun's children, or the one process."""
        if self.num_ranks == 1:
            return [self.popen.pid]
        tasks = Path(f"/proc/{self.popen.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                os.killpg(self.popen.pid, signal.SIGKILL)
                raise AssertionError("\n".join(self.popen.communicate()))
            time.sleep(0.05)

    def listens(self) -> bool:
        """Whether every rank has its signal handlers: Python alone leaves SIGTERM to the system."""
        ranks = self.ranks()
        return len(ranks) == self.num_ranks and all(map(catches_sigterm, ranks))

    def press_ctrl_c(self) -> tuple[str, str]:
        """stdout and stderr of a job that ends within 30 s with all its ranks."""
        ranks, began = self.ranks(), time.monotonic()
        assert len(ranks) == self.num_ranks
        os.killpg(self.popen.pid, signal.SIGINT)
        out, err = self.popen.communicate(timeout=60)
        while any(map(alive, ranks)) and time.monotonic() < began + 30:
            time.sleep(0.05)  # a rank closes its streams before it leaves
        assert not any(map(alive, ranks))
        assert time.monotonic() < began + 30
        return out, err


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def steps_of(run_dir: Path) -> list[int]:
    """The steps that a run has logged."""
    return [json.loads(line)["step"] for line in lines_of(run_dir / "metrics.jsonl")]


def killed_run(path: Path, num_ranks: int, words: Sequence[str]) -> int:
    """Start `recipes/grpo.py` in `path`, and kill its rank 1 after more than four logged lines, as
    `kill -9` does. Returns the last step that it logged."""
    endless = [*words, "steps=1000", "checkpoint.every=2", f"run_dir={path}"]
    job = Foreground("grpo.py", num_ranks, *endless)
    job.wait_for(lambda: len(steps_of(path)) > 4 if (path / "metrics.jsonl").exists() else False)
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.popen.communicate(timeout=60)
    return steps_of(path)[-1]
