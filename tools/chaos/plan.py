"""Schedule of the rounds of tools/chaos.py: a pure function of the seed, so one can be repeated."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.chaos.killing import KillPoint
from tools.chaos.phase_reporter import WRITING

# name: (ranks, layout); trainer dp_replicate x dp_shard x tp, generator dp x tp
MESHES = {
    "fsdp2": (2, "colocated", (1, 2, 1), (2, 1)),
    "tp2": (2, "colocated", (1, 1, 2), (1, 2)),
    "replicas2": (2, "colocated", (2, 1, 1), (2, 1)),
    "split1+1": (2, "split", (1, 1, 1), (1, 1)),
    "fsdp4": (4, "colocated", (1, 4, 1), (4, 1)),
    "fsdp2xtp2": (4, "colocated", (1, 2, 2), (2, 2)),
    "split2+2": (4, "split", (1, 2, 1), (1, 2)),
}
SAME = ("fsdp2", "tp2", "split1+1", "fsdp2", "split1+1", "tp2", "fsdp2xtp2")
CHANGES = (
    ("fsdp2", "fsdp4"),
    ("split1+1", "fsdp2"),
    ("fsdp2", "split1+1"),
    ("fsdp2xtp2", "fsdp2"),
    ("fsdp2", "tp2"),
    ("tp2", "replicas2"),
    ("split1+1", "tp2"),
    ("tp2", "fsdp2xtp2"),
    ("fsdp2", "replicas2"),
    ("split1+1", "split2+2"),
)
STEPS = 6
FIRST = (  # phases of a first kill; "load" can only be a second
    *("startup", "between", "generate", "exchange", "train", "sync"),
    *("eval", "log", "checkpoint", "writing", "rename", "save"),
)
VICTIMS = ("one rank", "all ranks", "torchrun and all")


@dataclass(frozen=True)
class Round:
    """One run: it starts on the first of `meshes` and resumes on the next after each kill.

    `every`: steps between checkpoints.
    """

    number: int
    meshes: tuple[str, ...]
    kill_points: tuple[KillPoint, ...]
    every: int


def plan(rounds: int, seed: int, most_ranks: int) -> list[Round]:
    """Schedule each phase in turn, in an order that the seed draws.

    Two rounds of five change the mesh; every third kills twice.
    """
    changes = [pair for pair in CHANGES if max(MESHES[m][0] for m in pair) <= most_ranks]
    same = [mesh for mesh in SAME if MESHES[mesh][0] <= most_ranks]
    phases: list[str] = []
    order = random.Random(seed)
    while len(phases) < 2 * rounds:
        phases += order.sample(FIRST, len(FIRST))
    planned, changed, twice = [], 0, 0
    for number in range(rounds):
        draws = random.Random(f"{seed}/{number}")
        if number % 3 == 2:
            chosen, twice = pair_of(phases, loads=twice % 3 == 0), twice + 1
        else:
            chosen = [phases.pop(0)]
        meshes = (same[number % len(same)],) * (len(chosen) + 1)
        if number % 5 in (1, 3):
            first, second = changes[changed % len(changes)]
            meshes, changed = (first, second, first)[: len(chosen) + 1], changed + 1
        planned.append(round_of(number, meshes, chosen, draws))
    return planned


def pair_of(phases: list[str], loads: bool) -> list[str]:
    """Take the next two phases, or the next one and `load`, in an order in which both can happen:
    nothing comes after `save`, and what is loaded must have been written.
    """
    if loads:
        first = next(phase for phase in phases if phase not in ("startup", "save"))
        phases.remove(first)
        return [first, "load"]
    first, second = phases.pop(0), phases.pop(0)
    return [second, first] if first in ("startup", "save") else [first, second]


def round_of(
    number: int, meshes: tuple[str, ...], phases: list[str], draws: random.Random
) -> Round:
    """Draw a round's kill points.

    Every tenth round may kill before the first checkpoint; of two kills the second comes soon after
    the resume.
    """
    two = len(phases) == 2
    every = 1 if two else draws.choice((1, 2))
    kill_points = []
    for leg, phase in enumerate(phases):
        after = draws.choice((0, 1) if leg else (3,) if two else (4,) if every == 2 else (3, 4))
        if number % 10 == 5 or phase in ("startup", "load", "save"):
            after = 0
        skip = draws.randrange({"between": 4, "log": 2}.get(phase, 1))
        victims, fraction, draw = draws.choice(VICTIMS), draws.random(), draws.random()
        kill_points.append(KillPoint(phase, victims, after, skip, fraction, draw))
    return Round(number, meshes, tuple(kill_points), every)


def victim_of(point: KillPoint, mesh: str) -> int:
    """The rank to kill: rank 0 renames; the trainer's ranks, which come first, train."""
    ranks, _, (replicate, shard, tp), _ = MESHES[mesh]
    if point.phase == "rename":
        return 0
    writers = 1 if replicate > 1 and point.phase == WRITING else replicate
    trains = point.phase in ("train", "checkpoint", "save", WRITING)
    return int(point.draw * (writers * shard * tp if trains else ranks))


def words_of(mesh: str) -> list[str]:
    """The layout of a mesh as command-line arguments."""
    _, mode, (replicate, shard, tp), (generator_dp, generator_tp) = MESHES[mesh]
    return [
        f"mesh.mode={mode}", f"trainer.dp_replicate={replicate}", f"trainer.dp_shard={shard}",
        f"trainer.tp={tp}", f"generator.dp={generator_dp}", f"generator.tp={generator_tp}",
    ]  # fmt: skip
