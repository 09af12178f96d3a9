"""Layouts of every weight, by role."""

from __future__ import annotations

import torch

from mesh.layout.reshard import ParamLayout, layouts_of
from mesh.model.parallel import tp_dims, tp_parts
from mesh.model.policy import Policy, model_config, named_weights
from mesh.types import ModelShape


def role_layouts(
    shape: ModelShape, max_length: int, grid: torch.Tensor, fsdp: bool, sliced: bool = False
) -> list[ParamLayout]:
    """Layouts of every weight and buffer of a role on ranks `grid[dp_replicate, dp_shard, tp]`.

    sliced: where ranks share kv heads, a rank holds its own, as in vLLM's models; else all of them.
    Pure: every rank computes the layouts of both roles, including one it does not take part in.
    """
    with torch.device("meta"):
        model = Policy(model_config(shape, max_length))
    buffers = dict(model.named_buffers())
    shapes = {name: tuple(x.shape) for name, x in {**named_weights(model), **buffers}.items()}
    tp = grid.shape[2]
    dims, parts = tp_dims(model, tp), {}
    if sliced:
        dims, parts = tp_dims(model, 1), tp_parts(model, tp)
    return layouts_of(shapes, dims, grid.numpy(), fsdp, buffers, parts)


def weight_names(shape: ModelShape) -> set[str]:
    """Names of all weights, without buffers; a tied weight has two."""
    with torch.device("meta"):
        return set(named_weights(Policy(model_config(shape, 1))))
