"""Progress of a run on stdout, one line per step; a terminal has `mesh/runs/live.py` instead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Metrics = dict[str, Any]
REWARD, EVALUATION = "reward/mean", "eval/accuracy"
RATE, RATE_UNIT = "tokens_per_second/", " tok/s"
SHORT = {"generate": "gen"}
PART = "reward/"
OF_REWARDS = (REWARD, "reward/std", "reward/failed")
MOST_PARTS = 3  # of a score that are shown
LAST_STEPS = 20  # the pace is the mean of so many steps


@dataclass
class Pace:
    """Seconds per step and time to go. `now` is the clock [s]."""

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

    def leave_out(self) -> None:
        """Leave the last step, up to now, out of the pace: it took long for a reason of its own."""
        *earlier, (before, began), _ = self._times
        lost = self.now() - began
        moved = [(step + 1, moment + lost) for step, moment in [*earlier, (before, began)]]
        self._times = deque(moved, maxlen=self._times.maxlen)

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
    """The values shown of a step, by label; a metric that was not measured is left out."""
    shown = {}
    loss = [] if REWARD in metrics else [("loss", "loss", "{:.3f}")]
    parts = [key for key in sorted(metrics) if key.startswith(PART) and key not in OF_REWARDS]
    for label, key, form in (
        ("reward", REWARD, "{:.3f}"),
        *loss,
        *((key, key, "{:.3f}") for key in parts[:MOST_PARTS]),
        ("length", "response_length/mean", "{:.1f}"),
        ("truncated", "response/truncated", "{:.0%}"),
        ("skipped", "prompts/skipped", "{:.0f} prompts"),
        ("entropy", "entropy", "{:.3f}"),
        ("eval", EVALUATION, "{:.3f}"),
        ("logprob_diff", "logprob_diff/max", "{:.1e}"),
    ):
        if metrics.get(key) is not None:  # null in the log of a resumed run: not a finite number
            shown[label] = form.format(metrics[key])
    for key in metrics:
        if key.startswith(RATE):
            phase = key.removeprefix(RATE)
            shown[SHORT.get(phase, phase)] = thousands(metrics[key]) + RATE_UNIT
    if metrics.get("steps_without_signal", 0) > 0:
        shown["no signal"] = f"{metrics['steps_without_signal']:.0f}"
    each = pace.seconds_per_step()
    shown["pace"] = "? s/step" if each is None else f"{each:.2f} s/step"
    shown["ETA"] = pace.eta()
    return shown


def units(metrics: Metrics, pace: Pace) -> list[str]:
    """The same as texts that are not broken: `step   12/150`, `reward 0.531`, `0.82 s/step`."""
    shown = columns(metrics, pace)
    texts = [text if label == "pace" else f"{label} {text}" for label, text in shown.items()]
    return [f"step {pace.step:4}/{pace.steps}", *texts]


def plain_line(metrics: Metrics, pace: Pace) -> str:
    """`step   12/150  reward 0.531  eval 0.480  ...  train 45.6k tok/s  0.82 s/step  ETA 1:53`."""
    return "  ".join(units(metrics, pace))


def packed(widths: Sequence[int], limit: int) -> list[range]:
    """Consecutive items as rows that fit into `limit` columns, two spaces between items; an item
    that is wider has a row of its own."""
    rows, first = [], 0
    for end in range(1, len(widths) + 1):
        together = range(first, end + 1)
        if end == len(widths) or sum(widths[i] + 2 for i in together) - 2 > limit:
            rows.append(range(first, end))
            first = end
    return rows


class PlainProgress:
    """One line per step, for files and pipes, after one that names the run directory."""

    def __init__(self, pace: Pace, run_dir: Path):
        self._pace = pace
        print(f"run {run_dir}", flush=True)

    def update(self, metrics: Metrics, evaluated: bool) -> None:
        print(plain_line(metrics, self._pace), flush=True)

    def close(self) -> None:
        pass
