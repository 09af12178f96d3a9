"""A difference gets the name of the first module that makes it: both sides run again with hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from mesh.exactness.batch import Walk
from mesh.exactness.bits import Key, Place, Tally, of_all_ranks
from mesh.exactness.trace import Trace, first_difference, first_not_finite
from mesh.lifecycle.process import Process

Tracer = Callable[[Key], Trace]
"""Runs one side again; every rank calls it, those that do not have the sequence get no rows."""

NOTHING = Trace({}, {})
AGREED = "none: run again, both sides agree"


def settle(walk: Walk, tally: Tally, one: Tracer, other: Tracer, seek: bool = True) -> Tally:
    """The tallies of all ranks together, where the first difference has its module. Collective.

    one, other: the two sides that were compared; `seek` False where a module is known already.
    """
    process = walk.process
    total = of_all_ranks(process, tally)
    if not (seek and walk.seek) or total.first is None or total.first.key is None:
        return total
    return replace(total, first=named(process, total.first, one, other))


def named(process: Process, place: Place, one: Tracer, other: Tracer) -> Place:
    """`place` with the module, as the ranks find it that have the rows of both sides. Collective.

    The rank that saw the difference is asked first. Where no rank has both, one side is sent.
    """
    assert place.key is not None, "only a sequence can be traced"
    a, b = one(place.key), other(place.key)
    have = process.gather((bool(a.outputs), bool(b.outputs)))
    both = [rank for rank, sides in enumerate(have) if all(sides)]
    if both:
        judge = place.rank if place.rank in both else both[0]
    else:
        source, judge = (next(r for r, sides in enumerate(have) if sides[i]) for i in (0, 1))
        box = [a if process.rank == source else None]
        dist.broadcast_object_list(box, src=source, group=process.cpu_group)
        a = box[0] or NOTHING
    found = process.gather(_parting(a, b) if process.rank == judge else None)[judge]
    return replace(place, module=found[0], module_position=found[1])


def _parting(a: Trace, b: Trace) -> tuple[str, int | None]:
    """(module, position) at which the traces part, or are not finite."""
    difference = first_difference(a, b)
    if difference is not None:
        return difference.module, difference.position
    infinite = first_not_finite(a)
    if infinite is not None:
        return f"{infinite[0]} (not finite)", infinite[1]
    return AGREED, None
