"""A mismatch gets the name of the first divergent module: both sides run again with hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from mesh.exactness.comparison import Mismatch, Tally, of_all_ranks
from mesh.exactness.trace import Trace
from mesh.exactness.verdict import judge
from mesh.lifecycle.process import Process
from mesh.types import RolloutKey

Replay = Callable[[RolloutKey], Trace]
"""Runs one side again; every rank calls it, those that do not have the sequence get no rows."""

NOTHING = Trace({}, {})


def settle(process: Process, tally: Tally, one: Replay, other: Replay, seek: bool = True) -> Tally:
    """The tallies of all ranks together, with the module of the first mismatch. Collective.

    one, other: replays of the two sides that were compared; `seek` False: the module is not wanted.
    """
    total = of_all_ranks(process, tally)
    if not seek or total.first is None or total.first.key is None:
        return total
    return replace(total, first=named(process, total.first, one, other))


def named(process: Process, first: Mismatch, one: Replay, other: Replay) -> Mismatch:
    """The mismatch with its module, as the ranks find it that have the rows of both sides.

    The rank that saw the difference is asked first. Where no rank has both, one side is sent.
    Collective.
    """
    assert first.key is not None, "only a sequence can be traced"
    a, b = one(first.key), other(first.key)
    have = process.gather((bool(a.outputs), bool(b.outputs)))
    both = [rank for rank, sides in enumerate(have) if all(sides)]
    if both:
        judging = first.rank if first.rank in both else both[0]
    else:
        source, judging = (next(r for r, sides in enumerate(have) if sides[i]) for i in (0, 1))
        box = [a if process.rank == source else None]
        dist.broadcast_object_list(box, src=source, group=process.cpu_group)
        a = box[0] or NOTHING
    verdict = process.gather(judge(a, b) if process.rank == judging else None)[judging]
    assert verdict is not None
    return replace(first, module=verdict.short, module_position=verdict.position)
