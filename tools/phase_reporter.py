"""Runs a recipe unchanged and lets another process see in which phase each rank is.

    PHASE_FILE=FILE torchrun ... tools/phase_reporter.py recipes/grpo.py conf=qwen3_tiny ...

Every rank notes its present phase in its record of FILE, which is mapped into memory: what it says
is true at any moment, also after a kill -9. The phases that a recipe times, and some that it does
not, are noted by wrapping the library's functions from here; the library knows nothing of this.
`open_records` is how the other process reads.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

STARTUP, BETWEEN = "startup", "between"
PHASES = (
    STARTUP,  # imports, rendezvous, self-test, building both roles
    BETWEEN,  # what no other name covers: gathering samples, asking whether to stop
    *("load", "generate", "exchange", "train", "sync", "eval", "log"),
    "checkpoint",  # waiting for the last one, digests, the copy to host memory
    "rename",  # within a checkpoint, rank 0: index, rename, removal of old ones
    "save",  # the final model
)
WRITING = "writing"  # a thread of its own, beside the phases: a rank's file of a checkpoint
RECORD = np.dtype(
    [
        ("phase", "u1"),
        ("writing", "u1"),
        ("count", "u4", (len(PHASES) + 1,)),  # times that each phase ended; the last is writing's
        ("seconds", "f8", (len(PHASES) + 1,)),  # spent in it
    ]
)


def open_records(path: Path, num_ranks: int, new: bool = False) -> np.ndarray:
    """A record per rank; `new` ones are all zero, which is the start of `startup`."""
    return np.memmap(path, RECORD, "w+" if new else "r+", shape=(num_ranks,))


class Reporter:
    """Writes one rank's record."""

    def __init__(self, records: np.ndarray, rank: int):
        self.phase, self.flag = (records[field][rank : rank + 1] for field in ("phase", WRITING))
        self.count, self.seconds = records["count"][rank], records["seconds"][rank]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, began, code = int(self.phase[0]), time.perf_counter(), PHASES.index(name)
        if before == code:
            yield
            return
        if before == PHASES.index(STARTUP) and name != "load":
            before = PHASES.index(BETWEEN)
        self.phase[0] = code
        try:
            yield
        finally:
            self._ended(code, began)
            self.phase[0] = before

    @contextmanager
    def writing(self) -> Iterator[None]:
        began = time.perf_counter()
        self.flag[0] = 1
        try:
            yield
        finally:
            self._ended(len(PHASES), began)
            self.flag[0] = 0

    def _ended(self, code: int, began: float) -> None:
        self.seconds[code] += time.perf_counter() - began
        self.count[code] += 1


def within(phase: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, each call of it noted as a phase."""

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        with phase():
            return function(*args, **kwargs)

    return noted


def watch(report: Reporter) -> None:
    """Wrap what the recipe will import."""
    import mesh.evaluate
    import mesh.program
    from mesh.checkpoint.keeper import Checkpointer, Writing
    from mesh.metrics import MetricsLogger
    from mesh.phases import Phases

    timed = Phases.__call__

    @contextmanager
    def noted(phases: Phases, name: str) -> Iterator[None]:
        with timed(phases, name), report(name):
            yield

    def wrap(owner: Any, name: str, phase: Callable[[], Any]) -> None:
        setattr(owner, name, within(phase, getattr(owner, name)))

    Phases.__call__ = noted  # type: ignore[assignment, method-assign]
    wrap(Writing, "run", report.writing)
    wrap(Checkpointer, "_complete", lambda: report("rename"))
    wrap(Checkpointer, "load", lambda: report("load"))
    for name in ("log", "log_samples"):
        wrap(MetricsLogger, name, lambda: report("log"))
    wrap(mesh.evaluate, "evaluate", lambda: report("eval"))
    wrap(mesh.program, "save_model", lambda: report("save"))


def main(argv: list[str]) -> None:
    records = open_records(Path(os.environ["PHASE_FILE"]), int(os.environ["WORLD_SIZE"]))
    watch(Reporter(records, int(os.environ["RANK"])))
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)  # as when the recipe is run itself
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
