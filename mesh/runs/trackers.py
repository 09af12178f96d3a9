"""TensorBoard and W&B: copies of the metrics, whose outage never ends a run.

`metrics.jsonl` is the record. A tracker has a thread of its own that feeds it, so that one that
hangs does not hold up training either. Its first failure is a warning, the number of all of them
is in the run's last line. What a user has to change, such as a missing login, is refused at the
start instead.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mesh.config.keys import Refusal, problem
from mesh.lifecycle.ending import say

WANDB_ID = "wandb-id.txt"
WAITING = 1000  # steps that a tracker may be behind; it misses what comes then
Scalars = Mapping[str, int | float]


class Tracker(Protocol):
    """What is fed with the metrics of every step."""

    def log(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard. `first`: steps that a resumed run has taken; the events
    of later ones are dropped."""

    def __init__(self, run_dir: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = first + 1 if first else None
        path = str(run_dir / "tensorboard")
        self._writer: Any = SummaryWriter(path, flush_secs=10, purge_step=purge)

    def log(self, step: int, scalars: Scalars) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The W&B run of a run directory, the same one whenever it is resumed. The API key stays where
    W&B keeps it: in its own files or WANDB_API_KEY."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Raises Refusal where W&B asks for something that the user has to do, such as a login."""
        import wandb

        path = run_dir / WANDB_ID
        if not path.exists() or not path.read_text().strip():  # killed as it was written
            path.write_text(secrets.token_hex(4) + "\n")
        try:
            self._run: Any = wandb.init(
                project=project, name=run_dir.name, dir=str(run_dir), config=dict(config),
                allow_val_change=True,  # a resumed run may have other `steps`
                id=path.read_text().strip(), resume="allow",
            )  # fmt: skip
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            remedy = "do as it says, e.g. wandb login or WANDB_MODE=offline, or leave it unset"
            raise Refusal(problem("log.wandb", project, f"W&B: {error}", remedy)) from error
        # W&B ignores values for a step of its own counter that it has: ours may be logged again
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Scalars) -> None:
        self._run.log(dict(scalars) | {"step": step})

    def close(self) -> None:
        self._run.finish()


class Feed:
    """Owns a tracker and the thread that calls it."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """Raises what a user has to change (Refusal); another failure of `make` is the first one
        of the tracker, which is then missing."""
        self.name, self.failures, self.first = name, 0, ""
        self._queue: queue.Queue[tuple[int, Scalars] | None] = queue.Queue(WAITING)
        self._tracker: Tracker | None = None
        try:
            self._tracker = make()
        except Refusal:
            raise
        except Exception as error:  # whatever a tracker raises, here and below, is its outage
            self._failed(error)
        self._thread = threading.Thread(target=self._run, name=f"mesh-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Scalars) -> None:
        """Have the tracker log a step; returns at once."""
        if self._tracker is None:
            self.failures += 1
            return
        try:
            self._queue.put_nowait((step, scalars))
        except queue.Full:
            self._failed(RuntimeError(f"it is {WAITING} steps behind"))

    def close(self, seconds: float) -> None:
        """Have it finish, but wait no longer than this."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failed(RuntimeError(f"it did not finish within {seconds:g} s"))

    def summary(self) -> str:
        """`wandb failed 3 times (CommError: ...)`; empty if it never did."""
        times = f"{self.failures} time{'s' if self.failures > 1 else ''}"
        return f"{self.name} failed {times} ({self.first})" if self.failures else ""

    def _run(self) -> None:
        while self._tracker is not None and (item := self._queue.get()) is not None:
            try:
                self._tracker.log(*item)
            except Exception as error:
                self._failed(error)
        try:
            if self._tracker is not None:
                self._tracker.close()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            lines = str(error).strip().splitlines() or [""]
            self.first = f"{type(error).__name__}: {lines[0]}"
            say(f"{self.name} failed ({self.first}); the run goes on, and metrics.jsonl has it all")
