"""Passes over a data set: every item once in each, in an order of (seed, epoch)."""

from __future__ import annotations

import random
from functools import lru_cache


def steps_per_epoch(num: int, batch_size: int) -> int:
    """Steps of `batch_size` items that take `num` items once; the last one may be smaller."""
    return -(-num // batch_size)


def batch_of(num: int, batch_size: int, seed: int, step: int) -> tuple[int, ...]:
    """Indices of the items of a step (counted from 0 over all epochs)."""
    epoch, place = divmod(step, steps_per_epoch(num, batch_size))
    return epoch_order(num, seed, epoch)[place * batch_size : (place + 1) * batch_size]


@lru_cache(maxsize=1)  # steps ask in order
def epoch_order(num: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(num)."""
    order = list(range(num))
    random.Random(f"epoch/{seed}/{epoch}").shuffle(order)
    return tuple(order)
