"""The weight bridge between the two roles, and the storage that they may share."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mesh.config.schema import Conf
from mesh.engine.kinds import kind_of
from mesh.layout.meshes import resolve_device
from mesh.lifecycle.process import Process
from mesh.roles.generator import Generator
from mesh.roles.trainer import Trainer
from mesh.weights.bridge import Verify, WeightBridge


def verify_of(conf: Conf) -> Verify:
    """The syncs after which digests are compared: the configured ones, else the engine's own."""
    return conf.sync.verify or kind_of(conf).verify[resolve_device(conf)]


def connect(
    conf: Conf, process: Process, trainer: Trainer, generator: Generator, dtype: torch.dtype
) -> WeightBridge:
    """The weight bridge; where both roles' layouts and dtypes match, the engine takes the trainer's
    storage instead of its own.
    """
    assert dist.group.WORLD is not None, "the process group is not there"
    names = {layout.name for layout in generator.layouts}
    bridge = WeightBridge(
        {name: tensor for name, tensor in trainer.weights().items() if name in names},
        generator.weights(),
        [layout for layout in trainer.layouts if layout.name in names],
        generator.layouts,
        dtype=dtype,
        group=dist.group.WORLD,
        cpu_group=process.cpu_group,
        verify=verify_of(conf),
        bucket_bytes=conf.sync.bucket_mb << 20,
        device=process.device,
        allow_alias=generator.binds,
    )
    if bridge.aliased:
        generator.bind(bridge.aliases())
        bridge.bind(generator.weights())
    return bridge
