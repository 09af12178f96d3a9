"""The trainer's models: sharded, with the weights of its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mesh.layout.holdings import local_tensors
from mesh.layout.reshard import Block, ParamLayout
from mesh.model.hf import load_weights
from mesh.model.init import random_weights
from mesh.model.policy import Policy, build_policy, named_weights
from mesh.roles.trainer_settings import ModelSource, TrainerSettings


def own_blocks(layouts: Sequence[ParamLayout]) -> dict[str, Block | None]:
    """This rank's block of every parameter, by name."""
    rank = dist.get_rank()
    return {layout.name: layout.blocks.get(rank) for layout in layouts}


def build_model(
    source: ModelSource,
    settings: TrainerSettings,
    mesh: DeviceMesh,
    device: torch.device,
    layouts: Sequence[ParamLayout],
) -> Policy:
    """A model of the trainer at its start, sharded and computed as the policy is. A collective of
    the trainer."""
    fsdp = {
        "compute_dtype": settings.dtype,
        "activation_checkpointing": settings.activation_checkpointing,
    }
    model = build_policy(
        source.shape, settings.max_length, device, source.dtype, mesh, fsdp,
        settings.sequence_parallel,
    )  # fmt: skip
    start = source.start
    blocks = own_blocks(layouts)
    with torch.no_grad():
        tensors = local_tensors(named_weights(model))
    if start.path is None:
        random_weights(tensors, {x.name: x.shape for x in layouts}, blocks, start.seed)
    else:
        load_weights(start.path, tensors, blocks, source.shape, source.stored_vocab)
    return model
