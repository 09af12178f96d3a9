"""The layouts of a world, and a program built in one of them for a while."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
import torch.distributed as dist

from mesh.config.changes import changed
from mesh.config.schema import Conf
from mesh.layout.meshes import layout_problems, plan_layout
from mesh.lifecycle.process import Process
from mesh.program.assembly import Program, assemble, sync
from mesh.program.checks import invariant_problems, sequence_problems
from mesh.program.plan import Plan
from mesh.types import ModelShape

DEGREES = (1, 2, 4)
"""Tensor-parallel degrees that are tried."""


@dataclass(frozen=True)
class TrainerLayout:
    """The trainer's keys."""

    dp_replicate: int
    dp_shard: int
    tp: int
    sequence_parallel: bool = False

    def __str__(self) -> str:
        text = f"trainer dp {self.dp_replicate}x{self.dp_shard} tp {self.tp}"
        return f"{text} sp" if self.sequence_parallel else text


@dataclass(frozen=True)
class GeneratorLayout:
    """The generator's keys."""

    dp: int
    tp: int

    def __str__(self) -> str:
        return f"generator dp {self.dp} tp {self.tp}"


@dataclass(frozen=True)
class Candidate:
    """A layout of the whole world."""

    mode: Literal["colocated", "split"]
    trainer: TrainerLayout
    generator: GeneratorLayout

    def applied(self, conf: Conf) -> Conf:
        """`conf` in this layout."""
        roles = {"trainer": self.trainer, "generator": self.generator}
        keys = {
            f"{role}.{name}": v
            for role, layout in roles.items()
            for name, v in vars(layout).items()
        }
        return changed(conf, {"mesh.mode": self.mode} | keys)

    def planned(self, conf: Conf, plan: Plan) -> Plan:
        """The plan of `conf` in this layout, in which nothing is trained."""
        layout = plan_layout(self.applied(conf), plan.layout.world_size)
        sequence_parallel = self.trainer.sequence_parallel
        trainer = replace(scoring_only(plan).trainer, sequence_parallel=sequence_parallel)
        return replace(plan, layout=layout, trainer=trainer)

    def __str__(self) -> str:
        trainer = self.trainer.dp_replicate * self.trainer.dp_shard * self.trainer.tp
        generator = self.generator.dp * self.generator.tp
        ranks = f"{trainer}" if self.mode == "colocated" else f"{trainer}+{generator}"
        return f"{self.mode} {ranks}: {self.trainer}, {self.generator}"


def trainer_layouts(size: int) -> list[TrainerLayout]:
    """Every way to lay a trainer out on so many ranks, sequence parallelism off and on."""
    return [
        TrainerLayout(replicate, size // (replicate * tp), tp, sequence_parallel)
        for tp in DEGREES
        for replicate in range(1, size + 1)
        for sequence_parallel in ((False, True) if tp > 1 else (False,))
        if size % (replicate * tp) == 0
    ]


def generator_layouts(size: int) -> list[GeneratorLayout]:
    """Every way to lay a generator out on so many ranks."""
    return [GeneratorLayout(size // tp, tp) for tp in DEGREES if size % tp == 0]


def own_layout(conf: Conf, world_size: int) -> Candidate:
    """The configuration's."""
    layout = plan_layout(conf, world_size)
    trainer = TrainerLayout(*layout.trainer.shape, conf.trainer.sequence_parallel)
    return Candidate(
        layout.mode, trainer, GeneratorLayout(layout.generator.dp, layout.generator.tp)
    )


def scoring_only(plan: Plan) -> Plan:
    """The plan without an optimizer and frozen models."""
    return replace(plan, trainer=replace(plan.trainer, optimizer=None, frozen={}))


def candidates(conf: Conf, device: str, world_size: int, shape: ModelShape) -> list[Candidate]:
    """The layouts that `validate.layouts` asks for: colocated ones, then every split.

    all: each layout of the trainer with each of the generator; cover: each of them at least once.
    What the model or `invariant.chunks` does not allow is left out.
    """
    if conf.validate.layouts == "own":
        return [own_layout(conf, world_size)]
    found: list[Candidate] = []
    for trainer_size in (world_size, *range(1, world_size)):
        mode: Literal["colocated", "split"] = "split" if trainer_size < world_size else "colocated"
        generator_size = world_size - trainer_size or world_size
        trainers, generators = trainer_layouts(trainer_size), generator_layouts(generator_size)
        alone_t, alone_g = trainers[0], generators[0]  # without tensor parallelism: always fit
        trainers = [
            x
            for x in trainers
            if fits(Candidate(mode, x, alone_g), conf, device, world_size, shape)
        ]
        generators = [
            x
            for x in generators
            if fits(Candidate(mode, alone_t, x), conf, device, world_size, shape)
        ]
        if conf.validate.layouts == "all":
            pairs = list(product(trainers, generators))
        else:
            most = range(max(len(trainers), len(generators)))
            pairs = [(trainers[i % len(trainers)], generators[i % len(generators)]) for i in most]
        found += [Candidate(mode, *pair) for pair in pairs]
    return found


def fits(candidate: Candidate, conf: Conf, device: str, world_size: int, shape: ModelShape) -> bool:
    """True if a program can be built so; how a training batch is shared out is not asked."""
    conf = candidate.applied(conf)
    return not (
        layout_problems(conf, world_size, shape, training=False)
        + invariant_problems(conf, device, shape)
        + sequence_problems(conf)
    )


@contextmanager
def built(plan: Plan, process: Process) -> Iterator[Program]:
    """The program of `plan` for a block; afterwards its process groups are gone. Collective.

    Its memory goes with the last reference to it, before the next one is built. There is no
    self-test: validate has run it. No cache is released, which vLLM allows one
    engine of a process.
    """
    engine = replace(plan.generator.engine, releases=False)
    plan = replace(plan, generator=replace(plan.generator, engine=engine))
    gc.collect()
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
    groups, closers = set(dist.distributed_c10d._world.pg_map), len(process.closers)
    program = assemble(plan, process, self_test=False)
    sync(program)
    yield program
    for close in process.closers[closers:]:
        close()
    del process.closers[closers:]
    if process.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(process.cpu_group)  # no rank is in a collective of theirs any more
    for group in [group for group in dist.distributed_c10d._world.pg_map if group not in groups]:
        dist.destroy_process_group(group)
