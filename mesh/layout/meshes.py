"""Division of the world into a trainer submesh and a generator submesh.

Planning is pure, so that an impossible layout is refused before any process group exists; every
rank then builds the DeviceMeshes from the plan's explicit rank lists, in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mesh.config.keys import problem, refuse
from mesh.config.schema import Conf
from mesh.layout.sizes import degree_problems, size_problems, submesh_sizes, tp_problems
from mesh.types import ModelShape

AXES = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Parallelism:
    """Parallel degrees of one role; `dp_replicate` counts a generator's engines."""

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def size(self) -> int:
        return self.dp * self.tp

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of `AXES`."""
        return self.dp_replicate, self.dp_shard, self.tp


@dataclass(frozen=True)
class Layout:
    """The complete plan: every rank of the world is in one of the rank lists, or in both."""

    mode: Literal["colocated", "split"]
    world_size: int
    trainer: Parallelism
    generator: Parallelism
    trainer_ranks: tuple[int, ...]
    generator_ranks: tuple[int, ...]


def plan_layout(conf: Conf, world_size: int) -> Layout:
    """Plan the layout of `conf` on `world_size` ranks. Raises ValueError if it does not fit.

    An unset data-parallel axis fills its submesh. In split mode the trainer gets the first ranks.
    """
    refuse(degree_problems(conf) or size_problems(conf, world_size))
    sizes = submesh_sizes(conf, world_size)
    assert sizes is not None, "size_problems accepted an impossible split"
    trainer_size, generator_size = sizes
    replicate, tp = conf.trainer.dp_replicate, conf.trainer.tp
    trainer = Parallelism(replicate, trainer_size // (replicate * tp), tp)
    generator = Parallelism(generator_size // conf.generator.tp, 1, conf.generator.tp)
    ranks = tuple(range(world_size))
    return Layout(
        conf.mesh.mode,
        world_size,
        trainer,
        generator,
        ranks[:trainer_size],
        ranks[world_size - generator_size :],
    )


def layout_problems(
    conf: Conf, world_size: int, shape: ModelShape | None, training: bool = True
) -> list[str]:
    """List all that keeps `conf` from running on `world_size` ranks with a model of `shape`.

    `shape` None skips the model, for when its config.json cannot be read; `training` False skips
    the division of the training batch.
    """
    problems = degree_problems(conf)
    if problems:
        return problems
    problems = size_problems(conf, world_size)
    if training and not problems:
        problems = batch_problems(conf, world_size)
    if shape is not None:
        problems += tp_problems("trainer.tp", conf.trainer.tp, shape)
        problems += tp_problems("generator.tp", conf.generator.tp, shape)
    return problems


def batch_problems(conf: Conf, world_size: int) -> list[str]:
    """Check that prompts divide evenly over waves and the data-parallel ranks of both roles."""
    layout = plan_layout(conf, world_size)
    unit = conf.waves * math.lcm(layout.trainer.dp, layout.generator.dp)
    if conf.num_prompts % unit == 0:
        return []
    wrong = (
        f"is not a multiple of {unit}, which waves={conf.waves}, {layout.trainer.dp} data-parallel "
        f"ranks of the trainer and {layout.generator.dp} of the generator require"
    )
    below, above = conf.num_prompts // unit * unit, -(-conf.num_prompts // unit) * unit
    choices = f"{below} or {above}" if below else f"{above}"
    return [problem("num_prompts", conf.num_prompts, wrong, f"use {choices}")]


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device type of a run: auto is cuda where there is one. Asked once, by `launch`."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


@dataclass(frozen=True)
class Meshes:
    """DeviceMeshes of a layout; the roles share one object if their layouts are equal.

    trainer_cpu_group: a gloo group of the trainer's ranks.
    """

    layout: Layout
    world_mesh: DeviceMesh
    trainer_mesh: DeviceMesh
    generator_mesh: DeviceMesh
    rank: int
    trainer_cpu_group: dist.ProcessGroup

    @property
    def on_trainer(self) -> bool:
        return self.rank in self.layout.trainer_ranks

    @property
    def on_generator(self) -> bool:
        return self.rank in self.layout.generator_ranks


def build_meshes(layout: Layout, device_type: str, timeout: timedelta | None = None) -> Meshes:
    """Build the world's mesh (axis `world`) and both roles' (`AXES`). Collective over the world.

    timeout: for every collective of the roles; otherwise torch's default applies.

    The default process group must exist with `layout.world_size` ranks. Every rank builds both
    roles' meshes, because creating a process group is a collective over the world.
    """
    assert dist.get_world_size() == layout.world_size, "the layout has another world size"
    world_mesh = DeviceMesh(device_type, torch.arange(layout.world_size), mesh_dim_names=("world",))
    trainer_mesh = _role_mesh(layout.trainer, layout.trainer_ranks, device_type)
    same = (layout.trainer, layout.trainer_ranks) == (layout.generator, layout.generator_ranks)
    generator_mesh = (
        trainer_mesh if same else _role_mesh(layout.generator, layout.generator_ranks, device_type)
    )
    for mesh in (trainer_mesh, generator_mesh):
        if timeout is not None and mesh.get_coordinate() is not None:
            for axis in AXES:
                dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(axis))
    ranks = list(layout.trainer_ranks)
    cpu_group = dist.new_group(ranks, backend="gloo", timeout=timeout)
    return Meshes(layout, world_mesh, trainer_mesh, generator_mesh, dist.get_rank(), cpu_group)


def _role_mesh(parallelism: Parallelism, ranks: tuple[int, ...], device_type: str) -> DeviceMesh:
    return DeviceMesh(device_type, torch.tensor(ranks).view(parallelism.shape), mesh_dim_names=AXES)


def coordinate(role_mesh: DeviceMesh) -> tuple[int, int, int] | None:
    """This rank's coordinate on `AXES` of a role's mesh; None off it."""
    place = role_mesh.get_coordinate()
    return None if place is None else (place[0], place[1], place[2])


def dp_rank(role_mesh: DeviceMesh) -> int | None:
    """This rank's data-parallel index, dp_replicate before dp_shard; None off the mesh."""
    place = coordinate(role_mesh)
    return None if place is None else place[0] * role_mesh.size(1) + place[1]
