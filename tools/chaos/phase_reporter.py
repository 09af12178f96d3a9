"""Run a recipe unchanged, publish the phase each rank is in, and stop a rank on request.

    PHASE_FILE=FILE torchrun ... tools/chaos/phase_reporter.py recipes/grpo.py conf=qwen3_tiny ...

Every rank writes its current phase into its record of FILE, which is memory-mapped, so the record
stays true after a kill -9. If the record asks for it, the rank stops itself (SIGSTOP) a number of
seconds after it has entered a phase, until the other process kills or continues it: a phase of a
millisecond cannot be caught from outside on a busy machine.

Phases are recorded by wrapping the library's functions from here; the library does not know of it.
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

STARTUP, BETWEEN = "startup", "between"
PHASES = (
    STARTUP,  # imports, rendezvous, self-test, building both roles
    BETWEEN,  # everything else: gathering samples, asking whether to stop
    *("load", "generate", "exchange", "train", "sync", "eval", "log"),
    "checkpoint",  # the best model, waiting for the last one, digests, the copy to host memory
    "rename",  # within a checkpoint, rank 0: index, rename, removal of old ones
    "save",  # the final model
)
WRITING = "writing"  # of a rank's checkpoint file, by a thread that runs beside the phases
ALL_OF = (*PHASES, WRITING)
RECORD = np.dtype(
    [
        ("phase", "u1"),
        ("writing", "u1"),
        ("count", "u4", (len(ALL_OF),)),  # times that each phase has ended
        ("seconds", "f8", (len(ALL_OF),)),  # spent in each
        # phase in which to stop: 1 + its number; 0: none
        ("stop_in", "u1"),
        ("stop_after", "u4"),  # steps that must be finished first
        ("stop_skip", "u4"),  # occurrences of the phase to skip after those
        ("stop_delay", "f8"),  # seconds after the phase has begun; 0: at once
    ]
)


def open_records(path: Path, num_ranks: int, new: bool = False) -> np.ndarray:
    """One record per rank; `new` ones are all zero, which means `startup`."""
    return np.memmap(path, RECORD, "w+" if new else "r+", shape=(num_ranks,))


class Reporter:
    """Writes one rank's record."""

    def __init__(self, records: np.ndarray, rank: int):
        self.record = records[rank : rank + 1]  # a view of the shared memory

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, began, code = int(self.record["phase"][0]), time.perf_counter(), ALL_OF.index(name)
        of_best = name == "save" and before == ALL_OF.index("checkpoint")
        if before == code or of_best:  # the best model is part of what a checkpoint names
            yield
            return
        if before == ALL_OF.index(STARTUP) and name != "load":
            before = ALL_OF.index(BETWEEN)
        self.record["phase"][0] = code
        self._stop_if_asked(code)
        try:
            yield
        finally:
            self._ended(code, began)
            self.record["phase"][0] = before
            self._stop_if_asked(before)

    @contextmanager
    def writing(self) -> Iterator[None]:
        began, code = time.perf_counter(), ALL_OF.index(WRITING)
        self.record[WRITING][0] = 1
        self._stop_if_asked(code)
        try:
            yield
        finally:
            self._ended(code, began)
            self.record[WRITING][0] = 0

    def _ended(self, code: int, began: float) -> None:
        self.record["seconds"][0, code] += time.perf_counter() - began
        self.record["count"][0, code] += 1

    def _stop_if_asked(self, code: int) -> None:
        record = self.record[0]
        if record["stop_in"] != code + 1 or finished_steps(record) < record["stop_after"]:
            return
        if record["stop_skip"]:
            record["stop_skip"] -= 1
            return
        record["stop_in"] = 0
        if record["stop_delay"] > 0:
            later = threading.Timer(record["stop_delay"], os.kill, (os.getpid(), signal.SIGSTOP))
            later.daemon = True
            later.start()
        else:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def finished_steps(record: Any) -> int:
    """Steps that a rank has finished in this start."""
    return int(record["count"][ALL_OF.index("sync")])


def within(phase: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with each call recorded as a phase."""

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        with phase():
            return function(*args, **kwargs)

    return noted


def watch(report: Reporter) -> None:
    """Wrap the functions whose calls are phases; the recipe imports them later."""
    import mesh.program.assembly
    import mesh.roles.evaluation
    from mesh.checkpoint.keeper import Checkpointer
    from mesh.checkpoint.writing import CheckpointWriter
    from mesh.lifecycle.timers import Phases
    from mesh.runs.metrics import MetricsLogger

    timed = Phases.__call__

    @contextmanager
    def noted(phases: Phases, name: str, *rest: Any, **keys: Any) -> Iterator[None]:
        with timed(phases, name, *rest, **keys), report(name):
            yield

    def wrap(owner: Any, name: str, phase: Callable[[], Any]) -> None:
        setattr(owner, name, within(phase, getattr(owner, name)))

    Phases.__call__ = noted  # type: ignore[assignment, method-assign]
    wrap(CheckpointWriter, "run", report.writing)
    wrap(Checkpointer, "complete", lambda: report("rename"))
    wrap(Checkpointer, "load", lambda: report("load"))
    wrap(MetricsLogger, "log", lambda: report("log"))
    wrap(mesh.roles.evaluation, "evaluate", lambda: report("eval"))
    wrap(mesh.program.assembly, "save_model", lambda: report("save"))


def main(argv: list[str]) -> None:
    records = open_records(Path(os.environ["PHASE_FILE"]), int(os.environ["WORLD_SIZE"]))
    watch(Reporter(records, int(os.environ["RANK"])))
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)  # as when the recipe is run itself
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
