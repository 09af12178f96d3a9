"""Sizes of the two submeshes, and the problems of a layout that does not fit the world.

Pure arithmetic over the configuration; `mesh/layout/meshes.py` turns sizes that fit into a plan. A
problem names a key that was set, never one whose value was left to us.
"""

from __future__ import annotations

import math

from mesh.config.keys import problem, range_problems
from mesh.config.schema import Conf
from mesh.types import ModelShape

MAX_TP = 8
"""The largest tensor-parallel degree: it cuts vocabularies into tiles, whatever the layout."""

DEGREES = (
    "trainer.dp_replicate",
    "trainer.dp_shard",
    "trainer.tp",
    "generator.dp",
    "generator.tp",
    "num_prompts",
    "group_size",
    "waves",
)


def submesh_sizes(conf: Conf, world_size: int) -> tuple[int, int] | None:
    """Ranks of trainer and generator; None where no split of this world fits unset axes."""
    if conf.mesh.mode == "colocated":
        return world_size, world_size
    trainer_unit = conf.trainer.dp_replicate * conf.trainer.tp
    if conf.trainer.dp_shard is not None:
        trainer_size = trainer_unit * conf.trainer.dp_shard
        return trainer_size, world_size - trainer_size
    if conf.generator.dp is not None:
        generator_size = conf.generator.dp * conf.generator.tp
        return world_size - generator_size, generator_size
    return even_split(trainer_unit, conf.generator.tp, world_size)


def even_split(trainer_unit: int, generator_unit: int, world_size: int) -> tuple[int, int] | None:
    """The largest generator of at most half the ranks, else the smallest of more than half.

    Both sizes are multiples of their units; None where no such pair adds up to the world.
    """
    fits = [
        size
        for size in range(generator_unit, world_size, generator_unit)
        if (world_size - size) % trainer_unit == 0
    ]
    at_most_half = [size for size in fits if size <= world_size // 2]
    if not fits:
        return None
    size = at_most_half[-1] if at_most_half else fits[0]
    return world_size - size, size


def degree_problems(conf: Conf) -> list[str]:
    """Degrees and batch sizes below their minimum, with which no layout can be computed."""
    return [line for line in range_problems(conf) if line.partition("=")[0] in DEGREES]


def size_problems(conf: Conf, world_size: int) -> list[str]:
    """Submeshes that do not fit the world, or leave ranks of it idle."""
    sizes = submesh_sizes(conf, world_size)
    if sizes is None:
        return [split_problem(conf, world_size)]
    if sizes[0] < 1 or sizes[1] < 1:
        return [crowding_problem(conf, world_size)]
    trainer, generator = conf.trainer, conf.generator
    of_trainer = {"trainer.tp": trainer.tp, "trainer.dp_replicate": trainer.dp_replicate}
    of_generator = {"generator.tp": generator.tp}
    return [
        *fill_problems("trainer", "trainer.dp_shard", trainer.dp_shard, of_trainer, sizes[0]),
        *fill_problems("generator", "generator.dp", generator.dp, of_generator, sizes[1]),
    ]


def split_problem(conf: Conf, world_size: int) -> str:
    """No split of the world into multiples of the trainer's and the generator's fixed degrees."""
    unit, generator_unit = conf.trainer.dp_replicate * conf.trainer.tp, conf.generator.tp
    wrong = (
        f"a world of {world_size} cannot be split into trainer ranks in multiples of {unit} "
        f"(trainer.dp_replicate x trainer.tp) and generator ranks in multiples of "
        f"{generator_unit} (generator.tp)"
    )
    remedy = f"start e.g. {unit + generator_unit} processes, or set mesh.mode=colocated"
    return problem("mesh.mode", "split", wrong, remedy)


def crowding_problem(conf: Conf, world_size: int) -> str:
    """One role of a split layout is as large as the world, or larger."""
    trainer, generator = conf.trainer, conf.generator
    if trainer.dp_shard is not None:
        taken = trainer.dp_replicate * trainer.dp_shard * trainer.tp
        name, value, role, other = "trainer.dp_shard", trainer.dp_shard, "trainer", "generator"
        needed = taken + (generator.dp or 1) * generator.tp
    else:
        assert generator.dp is not None, "both axes unset are split_problem's case"
        taken = generator.dp * generator.tp
        name, value, role, other = "generator.dp", generator.dp, "generator", "trainer"
        needed = taken + trainer.dp_replicate * trainer.tp
    wrong = f"the {role} takes {taken} of {world_size} ranks and leaves the {other} none"
    return problem(name, value, wrong, f"lower it, or start {needed} processes")


def fill_problems(
    role: str, axis: str, value: int | None, degrees: dict[str, int], size: int
) -> list[str]:
    """The problem where a role's data-parallel `axis` times its other `degrees`, which are never
    unset, is not the `size` of its submesh."""
    unit = math.prod(degrees.values())
    if value is None and size % unit:
        return [division_problem(role, degrees, size)]
    if value is not None and value * unit != size:
        wrong = f"makes {ranks(value * unit)}, but the {role} has {size}"
        remedy = f"set {axis}={size // unit}" if size % unit == 0 else "choose other degrees"
        return [problem(axis, value, wrong, f"{remedy}, or start another number of processes")]
    return []


def division_problem(role: str, degrees: dict[str, int], size: int) -> str:
    """The degree, or the two, with which no data-parallel axis fills the role's submesh."""
    other = "or start another number of processes"
    for name, degree in degrees.items():
        if size % degree:
            wrong = f"does not divide the {role}'s {ranks(size)}"
            return problem(name, degree, wrong, f"use a divisor of {size}, {other}")
    (name, degree), (second, times) = degrees.items()
    wrong = f"times {second}={times} does not divide the {role}'s {ranks(size)}"
    return problem(name, degree, wrong, f"use degrees whose product divides {size}, {other}")


def ranks(count: int) -> str:
    """1 rank, 2 ranks."""
    return f"{count} rank{'' if count == 1 else 's'}"


def tp_problems(name: str, tp: int, shape: ModelShape) -> list[str]:
    """The problem of a degree that does not shard heads, feed-forward columns and vocabulary into
    equal parts, or that has more ranks than kv heads and cannot give each rank one of them."""
    uneven = uneven_parts(tp, shape)
    if not uneven and MAX_TP % tp == 0:
        return []
    fit = [n for n in range(1, MAX_TP + 1) if MAX_TP % n == 0 and not uneven_parts(n, shape)]
    wrong = f"does not divide the model's {', '.join(uneven)}"
    if not uneven:
        wrong = f"does not divide {MAX_TP}, the number of vocabulary shards at the largest tp"
    return [problem(name, tp, wrong, f"choose one of {', '.join(map(str, fit))}")]


def uneven_parts(tp: int, shape: ModelShape) -> list[str]:
    """Parts of a model that `tp` ranks do not share evenly, with their number. A kv head may have
    several ranks."""
    parts = {
        "heads": shape.num_heads,
        "kv heads": shape.num_kv_heads,
        "ffn columns": shape.ffn_dim,
        "vocabulary entries": shape.vocab_size,
    }
    if tp % shape.num_kv_heads == 0:
        del parts["kv heads"]
    return [f"{count} {what}" for what, count in parts.items() if count % tp]
