"""Stall detection by the watchdog, on a clock of the test's own."""

from __future__ import annotations

import faulthandler

import pytest
import torch.distributed as dist

from mesh.lifecycle.watchdog import Watchdog


class World:
    """Ranks that see each other through one store, and how many `heartbeats` each has recorded."""

    def __init__(self, num_ranks: int, seconds: float):
        store = dist.HashStore()
        self.heartbeats = [0] * num_ranks
        self.dogs = [
            Watchdog(rank, num_ranks, store, seconds, lambda rank=rank: self.heartbeats[rank], 0.0)
            for rank in range(num_ranks)
        ]

    def verdicts(self, now: float) -> list[str | None]:
        return [dog.look(now) for dog in self.dogs]


@pytest.fixture(autouse=True)
def timer():
    yield
    faulthandler.cancel_dump_traceback_later()


def test_a_world_in_which_one_rank_makes_progress_has_not_stalled():
    world = World(3, seconds=900)
    for now in range(0, 5000, 5):
        world.heartbeats[1] += now % 800 == 0
        assert world.verdicts(now) == [None] * 3


def test_a_stall_is_seen_by_all_soon_after_its_time_and_names_who_fell_silent_first():
    world, found = World(2, seconds=900), {}
    for now in range(0, 2000):
        world.heartbeats[0] += now < 300
        world.heartbeats[1] += now < 200
        found |= {r: (now, said) for r, said in enumerate(world.verdicts(now)) if said}
        if len(found) == 2:
            break
    assert all(1200 <= now <= 1225 for now, _ in found.values())
    said = found[0][1]
    assert "no rank recorded a heartbeat for stall_seconds=900" in said
    assert said.index("rank 1 for 10") < said.index("rank 0 for 9")


def test_a_process_that_was_suspended_does_not_take_its_own_absence_for_silence():
    world = World(2, seconds=60)
    for now in range(30):
        world.heartbeats = [now, now]
        assert world.verdicts(now) == [None, None]
    for now in range(10_000, 10_050):
        assert world.verdicts(now) == [None, None]
    assert any(world.verdicts(now)[0] for now in range(10_050, 10_100))


def test_zero_seconds_are_for_ever():
    world = World(1, seconds=0)
    assert not any(world.verdicts(now)[0] for now in range(0, 100_000, 1000))
