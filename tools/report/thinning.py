"""Thinning of what is dense, so that a page stays small: the shape of a curve stays.

A curve keeps its first and last point and, of every stretch between, its smallest and largest
value and a gap, if it has one; a list of steps keeps its first, its last and evenly chosen ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def thinned(values: Sequence[float | None], most: int) -> list[int]:
    """Indexes of at most `most` (8 or more) values that are kept, in order."""
    count = len(values)
    if count <= most:
        return [*range(count)]
    stretches = max((most - 2) // 3, 1)
    kept = {0, count - 1}
    for stretch in range(stretches):
        inside = range(
            1 + (count - 2) * stretch // stretches, 1 + (count - 2) * (stretch + 1) // stretches
        )
        known = [(value, i) for i in inside if (value := values[i]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
        if len(known) < len(inside):
            kept.add(next(i for i in inside if values[i] is None))
    return sorted(kept)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items: the first, the last and evenly chosen ones, in order."""
    if len(items) <= most:
        return [*items]
    if most <= 1:
        return [*items[-most:]] if most else []
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def spread(items: Sequence[T]) -> list[T]:
    """All items in an order of which every beginning is spread over the whole: the first, the
    last, the middle, the quarters, and so on."""
    order, seen = [], set()
    for level in range(max(len(items), 1).bit_length() + 1):
        parts = 1 << level
        for part in range(parts + 1):
            index = part * (len(items) - 1) // parts
            if items and index not in seen:
                seen.add(index)
                order.append(items[index])
    return order


def rounded(value: float, digits: int = 3) -> float | int:
    """So many significant digits; whole numbers without a point, which is shorter."""
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def number(value: Any) -> float | None:
    """A finite number of JSON; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
