"""The state of a user's optimizer as checkpoints hold it: tensors by `KEY/WEIGHT`, and numbers.

A tensor may have any shape and dtype. It is stored by blocks, like the weights: a DTensor by its
shards, where they follow those of its weight, and a plain tensor whole, as the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from mesh.config.user_code import call_user_code
from mesh.layout.holdings import local_tensors
from mesh.layout.reshard import Block, ParamLayout
from mesh.roles.own_optimizer import KEY

OWN = "optimizer"
"""Kind of state that it is, beside `weights` and `ema`."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class OwnState:
    """tensors: by `KEY/WEIGHT`; numbers: plain values by weight and key, and those of its groups;
    problems: what is neither."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def state_of(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> OwnState:
    """The present state; the tensors are its own."""
    found = OwnState()
    by_weight: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        for key, value in dict(optimizer.state.get(weight, {})).items():
            if isinstance(value, Tensor) and value.dtype in DTYPES:
                found.tensors[f"{key}/{name}"] = value
            elif isinstance(value, PLAIN):
                by_weight.setdefault(name, {})[str(key)] = value
            else:
                found.problems.append(f"its state {key!r} of {name} is {_shown(value)}")
    known = set(weights.values())
    if any(key not in known for key in optimizer.state):
        found.problems.append("it has state of something that is no weight")
    groups = []
    for group in optimizer.param_groups:
        own = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr")}
        groups.append({k: v for k, v in own.items() if isinstance(v, PLAIN)})
        found.problems.extend(
            f"its group has a tensor {key!r}" for key, v in own.items() if isinstance(v, Tensor)
        )
    found.numbers.update(weights=by_weight, groups=groups)
    return found


def _shown(value: Any) -> str:
    dtype = f" of {value.dtype}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{dtype}, which no checkpoint can hold"


@torch.no_grad()
def prepare(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Have the optimizer make its state, whose values are then to be loaded: one step with
    gradients of 0, after which the weights have their bits again. ValueError where it raises.

    torch's own checkpoints do the same (`_init_optim_state` of torch.distributed.checkpoint).
    """
    kept = {name: local.to("cpu", copy=True) for name, local in local_tensors(weights).items()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        call_user_code(f"{KEY}: its step()", optimizer.step)
    finally:
        for weight in weights.values():
            weight.grad = None
    for name, local in local_tensors(weights).items():
        local.copy_(kept[name])


def fill_numbers(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Give the optimizer its plain values back."""
    for name, values in numbers["weights"].items():
        optimizer.state[weights[name]].update(values)
    for group, values in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(values)


def state_layouts(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    layouts: Mapping[str, ParamLayout],
    ranks: Sequence[int],
) -> tuple[list[ParamLayout], list[str]]:
    """The layouts of state on the trainer's `ranks`, from those of the weights, and problems."""
    found, problems = [], []
    for full, tensor in tensors.items():
        name = full.rpartition("/")[2]  # that of a weight has no slash
        layout = layout_of(full, tensor, weights[name], layouts[name], ranks)
        if isinstance(layout, str):
            problems.append(f"its state {full}: {layout}")
        else:
            found.append(layout)
    return found, problems


def layout_of(
    full: str, tensor: Tensor, weight: Tensor, layout: ParamLayout, ranks: Sequence[int]
) -> ParamLayout | str:
    """The layout of one tensor of state; a text where its shards are not those of its weight.

    A dim is whole, or sharded over the mesh axes over which the weight's is, in the same way.
    """
    shape = tuple(tensor.shape)
    whole = Block((0,) * len(shape), shape)
    if not isinstance(tensor, DTensor) or all(p == Replicate() for p in tensor.placements):
        return ParamLayout(full, shape, dict.fromkeys(ranks, whole))
    if any(isinstance(p, Partial) for p in tensor.placements):
        return "a DTensor of partial sums; call full_tensor() on it, or redistribute it"
    assert isinstance(weight, DTensor), "state is sharded, and its weight is not"
    sharded = []
    for dim in range(len(shape)):
        mine, theirs = (
            [(axis, p) for axis, p in enumerate(t.placements) if getattr(p, "dim", None) == dim]
            for t in (tensor, weight)
        )
        if mine and (mine != theirs or shape[dim] != layout.shape[dim]):
            return "a DTensor that is sharded otherwise than its weight; make it like the weight"
        if mine:
            sharded.append(dim)
    blocks = {}
    for rank, block in layout.blocks.items():
        offset = tuple(block.offset[d] if d in sharded else 0 for d in range(len(shape)))
        size = tuple(block.size[d] if d in sharded else shape[d] for d in range(len(shape)))
        blocks[rank] = Block(offset, size)
    return ParamLayout(full, shape, blocks)
