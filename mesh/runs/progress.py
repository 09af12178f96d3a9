"""What a person sees while a run trains: a live table on a terminal, else one line per step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

Metrics = dict[str, Any]
RATE = "tokens_per_second/"
SHORT = {"generate": "gen"}
LAST_STEPS = 20  # the pace is the mean of so many steps


@dataclass
class Pace:
    """How fast steps pass. `now` is the clock, in seconds."""

    steps: int
    now: Callable[[], float] = time.monotonic
    step: int = 0
    _times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LAST_STEPS + 1))

    def __post_init__(self) -> None:
        self.began = self.now()
        self._times.append((self.step, self.began))

    def advance(self, step: int) -> None:
        self.step = step
        self._times.append((step, self.now()))

    def seconds_per_step(self) -> float | None:
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (ended - began) / (last - first) if last > first else None

    def eta(self) -> str:
        each = self.seconds_per_step()
        return "?" if each is None else clock((self.steps - self.step) * each)


def clock(seconds: float) -> str:
    """0:07, 1:53, 2:03:09."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def thousands(number: float) -> str:
    """950, 12.3k, 4.56M."""
    if number < 1e3:
        return f"{number:.0f}"
    return f"{number / 1e3:.1f}k" if number < 1e6 else f"{number / 1e6:.2f}M"


def columns(metrics: Metrics, pace: Pace) -> dict[str, str]:
    """What is shown of a step, by its label; what was not measured is left out."""
    shown = {}
    for label, key, form in (
        ("reward", "reward/mean", "{:.3f}"),
        ("eval", "eval/accuracy", "{:.3f}"),
        ("logprob_diff", "logprob_diff/max", "{:.1e}"),
    ):
        if key in metrics:
            shown[label] = form.format(metrics[key])
    for key in metrics:
        if key.startswith(RATE):
            phase = key.removeprefix(RATE)
            shown[SHORT.get(phase, phase)] = thousands(metrics[key]) + " tok/s"
    each = pace.seconds_per_step()
    shown["pace"] = "? s/step" if each is None else f"{each:.2f} s/step"
    shown["ETA"] = pace.eta()
    return shown


def plain_line(metrics: Metrics, pace: Pace) -> str:
    """`step   12/150  reward 0.531  eval 0.480  ...  train 45.6k tok/s  0.82 s/step  ETA 1:53`."""
    shown = columns(metrics, pace)
    words = [text if label == "pace" else f"{label} {text}" for label, text in shown.items()]
    return "  ".join([f"step {pace.step:4}/{pace.steps}", *words])


class PlainProgress:
    """One line per step, for files and pipes."""

    def __init__(self, pace: Pace):
        self._pace = pace

    def update(self, metrics: Metrics, evaluated: bool) -> None:
        print(plain_line(metrics, self._pace), flush=True)

    def close(self) -> None:
        pass


class LiveProgress:
    """A table that is redrawn in place; steps with an evaluation leave their line above it."""

    def __init__(self, pace: Pace, console: Console):
        self._pace = pace
        self._metrics: Metrics = {}
        self._live = Live(
            console=console, get_renderable=self._table, refresh_per_second=2, transient=True
        )
        self._live.start()

    def update(self, metrics: Metrics, evaluated: bool) -> None:
        if evaluated:
            self._live.console.print(plain_line(metrics, self._pace), highlight=False)
        self._metrics = metrics

    def close(self) -> None:
        self._live.stop()

    def _table(self) -> Table:
        pace = self._pace
        table = Table("step", *columns(self._metrics, pace), "elapsed", "")
        elapsed = clock(pace.now() - pace.began)
        bar = ProgressBar(total=max(pace.steps, 1), completed=pace.step, width=20)
        step = f"{pace.step}/{pace.steps}"
        table.add_row(step, *columns(self._metrics, pace).values(), elapsed, bar)
        return table


def open_progress(pace: Pace, wanted: bool) -> PlainProgress | LiveProgress:
    """The live table where it is wanted and stdout is a terminal that can redraw."""
    console = Console()
    if wanted and console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(pace, console)
    return PlainProgress(pace)
