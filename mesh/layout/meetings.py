"""Which ranks wait for which others in the phases of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mesh.layout.meshes import Layout
from mesh.lifecycle.timers import Meeting


@dataclass(frozen=True)
class Meetings:
    """Of a layout. exchange: the trainer waits for what the generator's replicas make; verdict: all
    wait for rank 0's; flush: the generator waits until the trainer has taken everything; passes:
    the trainer's ranks that share a forward pass meet; update: all of the trainer's; sync: all of
    the world."""

    exchange: Meeting
    verdict: Meeting
    flush: Meeting
    passes: Meeting
    update: Meeting
    sync: Meeting


def meetings_of(layout: Layout) -> Meetings:
    """The meetings of a step on this layout."""
    world, trainers = range(layout.world_size), layout.trainer_ranks
    size = layout.trainer.dp_shard * layout.trainer.tp
    replicas = [trainers[first : first + size] for first in range(0, len(trainers), size)]
    return Meetings(
        exchange=[(trainers, layout.generator_ranks[:: layout.generator.tp])],
        verdict=[(world, [0])],
        flush=[(layout.generator_ranks, trainers)],
        passes=_each(replicas),
        update=_each([trainers]),
        sync=_each([world]),
    )


def _each(groups: Sequence[Sequence[int]]) -> Meeting:
    """The ranks of a group wait for each other."""
    return [(group, group) for group in groups]
