"""Whole passes over a list: each item once in each, in an order of (seed, epoch)."""

from __future__ import annotations

from mesh.tasks.order import Epochs


def steps_per_epoch(num: int, batch_size: int) -> int:
    """Steps of `batch_size` items that take `num` items once; the last one may be smaller."""
    return -(-num // batch_size)


def batch_of(num: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the items of a step (counted from 0 over all epochs)."""
    epoch, place = divmod(step, steps_per_epoch(num, batch_size))
    first, last = place * batch_size, min((place + 1) * batch_size, num)
    order = Epochs(num, seed)
    return [order.row(epoch * num + index) for index in range(first, last)]
