"""Tensor parallelism on local tensors: how weights are sharded, and the collectives.

Weights are DTensors on the tp axis (FSDP and checkpoints need to know what a shard is a shard of),
but the arithmetic runs on local tensors with explicit collectives: that fixes the order of every
sum here, and DTensor dispatch costs more than a small model's arithmetic.
`copy_to` and `reduce_from` are Megatron's conjugate f and g (arXiv:1909.08053, section 3). With
sequence parallelism (arXiv:2205.05198, section 4.2.2) a rank holds only its shard of the tokens,
dim -2, outside the tensor-parallel regions - residual stream, norms - and `enter` and `leave` are
that paper's g and g-bar. Modules involved have a `token_group`; None: every rank has all tokens.
Left out: gathering the inputs of column-parallel layers again in the backward pass, to save only
shards of them; full recomputation saves no more than the shards between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mesh.invariant.collectives import gather_tokens, shard_tokens, sum_to_shards

Backward = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of `tensor` (differentiable)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shard: torch.Tensor, num_tokens: int, group: dist.ProcessGroup, backward: Backward
    ) -> torch.Tensor:
        ctx.group, ctx.to_shards = group, backward
        return gather_tokens(shard, num_tokens, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.to_shards(grad, ctx.group), None, None, None


class _SumToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.num_tokens = group, partial.shape[-2]
        return sum_to_shards(partial, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_tokens(grad, ctx.num_tokens, ctx.group), None


def copy_to(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Pass a replicated tensor to rank-local work; its gradient is summed over the group."""
    return x if group is None else _CopyTo.apply(x, group)


def reduce_from(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum rank-local partial results into a replicated tensor."""
    return x if group is None else _ReduceFrom.apply(x, group)


def enter(
    x: torch.Tensor,
    num_tokens: int,
    tp_group: dist.ProcessGroup | None,
    token_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Pass all `num_tokens` activations to a tensor-parallel region; gradients are summed."""
    if token_group is None:
        return copy_to(x, tp_group)
    return _Gather.apply(x, num_tokens, token_group, sum_to_shards)


def leave(
    partial: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    token_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Sum a tensor-parallel region's partial results, for all tokens or this rank's shard."""
    if token_group is None:
        return reduce_from(partial, tp_group)
    return _SumToShards.apply(partial, token_group)


def replicate(
    x: torch.Tensor, num_tokens: int, token_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Gather all tokens for work that every rank duplicates: each has its whole gradient."""
    if token_group is None:
        return x
    return _Gather.apply(x, num_tokens, token_group, shard_tokens)


def tp_dim(module: nn.Module, tp: int) -> int | None:
    """Dim that `tp` tensor-parallel ranks shard of a module's own parameters; None: replicated.

    A module declares it as `tp_dim`, and as `tp_parts` into how many parts the dim can be cut at
    most: with more ranks than parts the parameters are replicated, and each rank uses one part.
    """
    parts = getattr(module, "tp_parts", None)
    return None if parts is not None and parts < tp else getattr(module, "tp_dim", None)


def own_part(
    parameter: torch.Tensor, parts: int | None, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """This rank's rows of a parameter that is sharded over the group's ranks or, where it has fewer
    parts than ranks, replicated: then ranks share a part, and their gradients of it are summed.
    """
    tensor = local(parameter)
    if group is None or parts is None or group.size() <= parts:
        return tensor
    first = group.rank() * parts // group.size()
    rows = len(tensor) // parts
    return copy_to(tensor, group)[first * rows : (first + 1) * rows]


def tp_dims(model: nn.Module, tp: int) -> dict[str, int | None]:
    """Dim that `tp` tensor-parallel ranks shard, for every parameter and buffer by name. None:
    replicated.
    """
    return {name: tp_dim(module, tp) for name, module in _owners(model)}


def tp_parts(model: nn.Module, tp: int) -> dict[str, int]:
    """The number of parts of those parameters that have fewer of them than ranks, by name."""
    parts = {name: getattr(module, "tp_parts", None) for name, module in _owners(model)}
    return {name: count for name, count in parts.items() if count is not None and count < tp}


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every parameter and buffer by name, with its module."""
    for prefix, module in model.named_modules():
        for name, _ in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            yield f"{prefix}.{name}" if prefix else name, module


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
    """Turn every parameter of `model` into a DTensor on the tp axis and give modules their groups.

    Parameters shared between modules (tied weights) stay shared.
    """
    group = tp_mesh.get_group()
    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if hasattr(module, "tp_group"):
            setattr(module, "tp_group", group)  # noqa: B010
        if sequence_parallel and hasattr(module, "token_group"):
            setattr(module, "token_group", group)  # noqa: B010
        dim = tp_dim(module, tp_mesh.size())
        placement = Replicate() if dim is None else Shard(dim)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in done:
                sharded = distribute_tensor(parameter.detach(), tp_mesh, [placement])
                done[parameter] = nn.Parameter(sharded)
            module.register_parameter(name, done[parameter])


def adopt(model: nn.Module, name: str, old: torch.Tensor, tensor: torch.Tensor) -> None:
    """Make `tensor` the local storage of the parameter or buffer `name`, currently `old`."""
    same = tensor.shape == local(old).shape and tensor.dtype == old.dtype
    assert same, f"{name}: the new storage has another shape or dtype"
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(old, DTensor):
        tensor = DTensor.from_local(
            tensor, old.device_mesh, old.placements, shape=old.shape, stride=old.stride()
        )
    if leaf in module._parameters:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(leaf, tensor, persistent=False)
