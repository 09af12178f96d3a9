"""What the rounds of tools/chaos.py do: a pure function of the seed, to run one of them again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.chaos.killing import Aim
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
FIRST = (  # "load" can only be the second
    *("startup", "between", "generate", "exchange", "train", "sync"),
    *("eval", "log", "checkpoint", "writing", "rename", "save"),
)
VICTIMS = ("one rank", "all ranks", "torchrun and all")


@dataclass(frozen=True)
class Round:
    """One run: it starts on the first of `meshes`, and after each of the kills goes on on the
    next. `every`: steps between checkpoints."""

    number: int
    meshes: tuple[str, ...]
    aims: tuple[Aim, ...]
    every: int


def plan(rounds: int, seed: int, most_ranks: int) -> list[Round]:
    """Each phase in turn, in an order of the seed's; two rounds of five change the mesh, every
    third kills twice."""
    changes = [pair for pair in CHANGES if max(MESHES[m][0] for m in pair) <= most_ranks]
    same = [mesh for mesh in SAME if MESHES[mesh][0] <= most_ranks]
    phases: list[str] = []
    order = random.Random(seed)
    while len(phases) < 2 * rounds:
        phases += order.sample(FIRST, len(FIRST))
    planned, changed, twice = [], 0, 0
    for number in range(rounds):
        dice = random.Random(f"{seed}/{number}")
        if number % 3 == 2:
            chosen, twice = pair_of(phases, loads=twice % 3 == 0), twice + 1
        else:
            chosen = [phases.pop(0)]
        meshes = (same[number % len(same)],) * (len(chosen) + 1)
        if number % 5 in (1, 3):
            first, second = changes[changed % len(changes)]
            meshes, changed = (first, second, first)[: len(chosen) + 1], changed + 1
        planned.append(round_of(number, meshes, chosen, dice))
    return planned


def pair_of(phases: list[str], loads: bool) -> list[str]:
    """The next two phases, taken out of the list, or the next one and `load`, in an order in which
    both can be met: nothing comes after `save`; what is loaded must have been written.
    """
    if loads:
        first = next(phase for phase in phases if phase not in ("startup", "save"))
        phases.remove(first)
        return [first, "load"]
    first, second = phases.pop(0), phases.pop(0)
    return [second, first] if first in ("startup", "save") else [first, second]


def round_of(number: int, meshes: tuple[str, ...], phases: list[str], dice: random.Random) -> Round:
    """Aims: once in a while before there is a checkpoint, else after one; of two kills the second
    soon after the resumed start."""
    two = len(phases) == 2
    every = 1 if two else dice.choice((1, 2))
    aims = []
    for leg, phase in enumerate(phases):
        after = dice.choice((0, 1) if leg else (3,) if two else (4,) if every == 2 else (3, 4))
        if number % 10 == 5 or phase in ("startup", "load", "save"):
            after = 0
        skip = dice.randrange({"between": 4, "log": 2}.get(phase, 1))
        victims, fraction, draw = dice.choice(VICTIMS), dice.random(), dice.random()
        aims.append(Aim(phase, victims, after, skip, fraction, draw))
    return Round(number, meshes, tuple(aims), every)


def victim_of(aim: Aim, mesh: str) -> int:
    """The rank that is aimed at: rank 0 renames; the trainer's ranks, the first ones, train."""
    ranks, _, (replicate, shard, tp), _ = MESHES[mesh]
    if aim.phase == "rename":
        return 0
    writers = 1 if replicate > 1 and aim.phase == WRITING else replicate
    trains = aim.phase in ("train", "checkpoint", "save", WRITING)
    return int(aim.draw * (writers * shard * tp if trains else ranks))


def words_of(mesh: str) -> list[str]:
    """The layout of a mesh as words of the command line."""
    _, mode, (replicate, shard, tp), (generator_dp, generator_tp) = MESHES[mesh]
    return [
        f"mesh.mode={mode}", f"trainer.dp_replicate={replicate}", f"trainer.dp_shard={shard}",
        f"trainer.tp={tp}", f"generator.dp={generator_dp}", f"generator.tp={generator_tp}",
    ]  # fmt: skip
