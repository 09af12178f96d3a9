"""The trackers of a run, each fed by a thread of its own, whose outage never ends the run.

`metrics.jsonl` is the record. A tracker that fails, or hangs, holds up nothing: its first failure
is a warning, the number of all of them is in the run's last line.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mesh.config.keys import Refusal
from mesh.config.secrets import shareable
from mesh.config.sections import LogConf
from mesh.lifecycle.ending import say
from mesh.runs.excerpts import excerpts, table_is_due
from mesh.runs.trackers import Entry, TensorBoard, Tracker, Trackio, Wandb

WAITING = 1000  # steps that a tracker may be behind; it misses what comes then
START_SECONDS = 120.0  # the longest wait for one to start; W&B gives up after 90


class Trackers:
    """All trackers of a run."""

    def __init__(
        self, run_dir: Path, conf: LogConf, steps: int, config: Mapping[str, Any], first: int
    ) -> None:
        """`first`: steps that a resumed run has taken. Raises Refusal where a tracker asks for
        something that the user has to do. They get `config` without what looks like a secret."""
        self._steps, config = steps, shareable(dict(config))
        makers: dict[str, Callable[[], Tracker]] = {}
        if conf.tensorboard:
            makers["TensorBoard"] = partial(TensorBoard, run_dir, first)
        if conf.wandb:
            makers["W&B"] = partial(Wandb, conf.wandb, run_dir, config)
        if conf.trackio:
            makers["trackio"] = partial(Trackio, conf.trackio, run_dir, config)
        self._feeds = [Feed(name, make) for name, make in makers.items()]

    def log(self, step: int, entry: Entry) -> None:
        """Tell all trackers of a step, once; returns at once."""
        if not table_is_due(step, self._steps):
            entry = replace(entry, samples=())
        for feed in self._feeds:
            feed.log(step, entry)

    def close(self, seconds: float) -> None:
        """Have each finish, but wait no longer than this for it."""
        for feed in self._feeds:
            feed.close(seconds)

    def summaries(self) -> list[str]:
        """One text for each that failed."""
        return [text for feed in self._feeds if (text := feed.summary())]


class Feed:
    """Owns a tracker and the thread that makes and calls it."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """Raises what a user has to change (Refusal); another failure of `make` is the first one
        of the tracker, which is then missing."""
        self.name, self.failures, self.first = name, 0, ""
        self._make = make
        self._queue: queue.Queue[tuple[int, Entry] | None] = queue.Queue(WAITING)
        self._refusal: Refusal | None = None
        self._missing = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mesh-{name}", daemon=True)
        self._thread.start()
        if not self._started.wait(START_SECONDS):
            self._failed(RuntimeError(f"it did not start within {START_SECONDS:g} s"))
        if self._refusal is not None:
            raise self._refusal

    def log(self, step: int, entry: Entry) -> None:
        """Have the tracker log a step; returns at once."""
        if self._missing:
            self.failures += 1
            return
        try:
            self._queue.put_nowait((step, entry))
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
        tracker = self._start()
        self._started.set()
        if tracker is None:
            return
        while (item := self._queue.get()) is not None:
            step, entry = item
            told = Entry(entry.scalars)
            with self._outage():
                told = drawn(entry)
            with self._outage():
                tracker.log(step, told)
        with self._outage():
            tracker.close()

    def _start(self) -> Tracker | None:
        try:
            with self._outage():
                return self._make()
        except Refusal as refusal:
            self._refusal = refusal
        self._missing = True
        return None

    @contextlib.contextmanager
    def _outage(self) -> Iterator[None]:
        """Whatever a tracker raises is its outage, except what the user has to change."""
        try:
            yield
        except Refusal:
            raise
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            lines = str(error).strip().splitlines() or [""]
            self.first = f"{type(error).__name__}: {lines[0]}"
            say(f"{self.name} failed ({self.first}); the run goes on, and metrics.jsonl has it all")


def drawn(entry: Entry) -> Entry:
    """What a tracker shows of an entry: a few of its samples, and histograms of finite values."""
    values = {
        name: [value for value in values if math.isfinite(value)]
        for name, values in entry.histograms.items()
    }
    histograms = {name: finite for name, finite in values.items() if finite}
    return Entry(entry.scalars, histograms, excerpts(entry.samples))
