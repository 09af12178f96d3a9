"""The weight bridge between the two roles, and the storage that they may share."""

from __future__ import annotations

import torch.distributed as dist

from mesh.lifecycle.process import Process
from mesh.program.plan import Plan
from mesh.roles.generator import Generator
from mesh.roles.trainer import Trainer
from mesh.weights.bridge import WeightBridge


def connect(plan: Plan, process: Process, trainer: Trainer, generator: Generator) -> WeightBridge:
    """The weight bridge; where both roles' layouts and dtypes match, the engine takes the trainer's
    storage instead of its own. Not with averaged weights, which come to it as the newest do.
    """
    assert dist.group.WORLD is not None, "the process group is not there"
    names = {layout.name for layout in generator.layouts}
    bridge = WeightBridge(
        {name: tensor for name, tensor in trainer.weights().items() if name in names},
        generator.weights(),
        [layout for layout in trainer.layouts if layout.name in names],
        generator.layouts,
        dtype=plan.generator.dtype,
        group=dist.group.WORLD,
        cpu_group=process.cpu_group,
        verify=plan.verify,
        bucket_bytes=plan.bucket_bytes,
        device=process.device,
        allow_alias=generator.binds and not trainer.averages,
    )
    if bridge.aliased:
        generator.bind(bridge.aliases())
        bridge.bind(generator.weights())
    return bridge
