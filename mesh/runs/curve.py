"""A metric over a whole run in a few numbers, and drawn in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_BLOCKS = 256
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-:=+*#"


class Curve:
    """Values of a metric in order, however many: means over blocks of equally many values.

    When there are too many blocks, each two become one. The first and the last value are kept.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self._span = 1  # values per block
        self._sums: list[float] = []
        self._count = 0  # of the last block

    def add(self, value: float) -> None:
        """Take in the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        if self.first is None:
            self.first = value
        self.last = value
        if not self._sums or self._count == self._span:
            self._merge_if_full()
            self._sums.append(0.0)
            self._count = 0
        self._sums[-1] += value
        self._count += 1

    def means(self) -> list[float]:
        """Of each block."""
        counts = [self._span] * (len(self._sums) - 1) + [self._count]
        return [total / count for total, count in zip(self._sums, counts, strict=False)]

    def _merge_if_full(self) -> None:
        if len(self._sums) == MOST_BLOCKS:
            self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
            self._span *= 2


def resampled(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: means of equal stretches of them."""
    if len(values) <= width:
        return list(values)
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    stretches = [values[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [sum(stretch) / len(stretch) for stretch in stretches]


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """A bar per value, from the lowest to the highest of them: at most `width` characters."""
    points = resampled(values, width)
    if not points:
        return ""
    low, high = min(points), max(points)
    if high == low:
        return bars[len(bars) // 2] * len(points)
    top = len(bars) - 1
    return "".join(bars[round((value - low) / (high - low) * top)] for value in points)
