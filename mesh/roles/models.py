"""The trainer's models: sharded, with the weights of its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from mesh.layout.holdings import local_tensors
from mesh.layout.reshard import Block, ParamLayout
from mesh.model.hf import load_weights
from mesh.model.init import random_weights
from mesh.model.policy import Policy, build_policy, named_weights
from mesh.roles.trainer_settings import TrainerSettings


def build_model(
    settings: TrainerSettings,
    mesh: DeviceMesh,
    device: torch.device,
    layouts: Sequence[ParamLayout],
    blocks: Mapping[str, Block | None],
) -> Policy:
    """The policy at its start. blocks: this rank's, by parameter. A collective of the trainer."""
    fsdp = {
        "compute_dtype": settings.dtype,
        "activation_checkpointing": settings.activation_checkpointing,
    }
    model = build_policy(
        settings.shape, settings.max_length, device, torch.float32, mesh, fsdp,
        settings.sequence_parallel,
    )  # fmt: skip
    start = settings.start
    with torch.no_grad():
        tensors = local_tensors(named_weights(model))
    if start.path is None:
        random_weights(tensors, {x.name: x.shape for x in layouts}, blocks, start.seed)
    else:
        load_weights(start.path, tensors, blocks, settings.shape)
    return model
