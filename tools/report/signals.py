"""Series of one metric, and the questions that findings ask of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tools.report.curves import Points

WINDOW = 5  # steps of a running median


@dataclass(frozen=True)
class Signal:
    """The finite values of a metric and their steps, in order; both may be empty."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.steps)

    def smooth(self, window: int = WINDOW) -> Signal:
        """The running median of so many steps; shorter by window - 1."""
        last = range(window - 1, len(self.values))
        medians = (statistics.median(self.values[i - window + 1 : i + 1]) for i in last)
        return Signal(self.steps[window - 1 :], tuple(medians))

    def means(self, window: int) -> Signal:
        """The running mean of so many steps; shorter by window - 1."""
        last = range(window - 1, len(self.values))
        found = (statistics.fmean(self.values[i - window + 1 : i + 1]) for i in last)
        return Signal(self.steps[window - 1 :], tuple(found))

    def first(self, count: int = WINDOW) -> float:
        """The median of the first values."""
        return statistics.median(self.values[:count])

    def last(self, count: int = WINDOW) -> float:
        """The median of the last values."""
        return statistics.median(self.values[-count:])

    def at(self, step: int) -> float | None:
        """The last value up to a step."""
        known = [v for s, v in zip(self.steps, self.values, strict=True) if s <= step]
        return known[-1] if known else None

    def before(self, step: int) -> float | None:
        """The largest value before a step."""
        known = (v for s, v in zip(self.steps, self.values, strict=True) if s < step)
        return max(known, default=None)

    def streak(self, holds: Callable[[float], bool], least: int) -> tuple[int, int] | None:
        """First and last step of the longest unbroken streak of at least `least` values that
        hold; of equal ones the first."""
        best: tuple[int, int] | None = None
        begin, longest = 0, least - 1
        for place in range(len(self.values) + 1):
            if place == len(self.values) or not holds(self.values[place]):
                if place - begin > longest:
                    longest, best = place - begin, (self.steps[begin], self.steps[place - 1])
                begin = place + 1
        return best

    def noise(self) -> float:
        """Standard deviation of one value about a slow trend, from differences of neighbours."""
        moves = [b - a for a, b in zip(self.values, self.values[1:], strict=False)]
        return statistics.pstdev(moves) / 2**0.5 if len(moves) > 1 else 0.0


def of_trained(points: Points, name: str) -> Points:
    """The points of a metric over the tokens that enter the loss, in the steps that have some: in
    others its value, 0, says nothing."""
    steps, values = points.get(name, ([], []))
    trained = dict(zip(*points.get("tokens/trained", ([], [])), strict=True))
    kept = [i for i, step in enumerate(steps) if trained.get(step) != 0]
    return {name: ([steps[i] for i in kept], [values[i] for i in kept])}


def signal(points: Points, name: str) -> Signal:
    """The finite values of a metric; empty where it was not logged."""
    steps, values = points.get(name, ((), ()))
    known = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    return Signal(tuple(s for s, _ in known), tuple(v for _, v in known))
