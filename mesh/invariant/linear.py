"""The linear layer that ends a tensor-parallel region, with the same bits at any degree: no sum
crosses ranks.

A rank computes its part of the output features, each as one whole sum over all input features. So
where Megatron's row-parallel layer (arXiv:1909.08053) adds partial products, this one gathers its
inputs, and its outputs after: about the bytes of an all-reduce, but nothing to round, nothing to
order, and nothing to pay with one rank. (Sums in fixed pieces of the input features, which an
all-reduce in a fixed order could put together, cost a GPU twice the time of that layer on every
rank.) Its backward pass gathers the weight for the same reason.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.invariant.collectives import gather_tokens, pad_tokens, shard_size


def gather_features(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' features, in their order: [..., D / ranks] -> [..., D]."""
    ranks = dist.get_world_size(group)
    parts = x.new_empty(ranks * len(x), *x.shape[1:])
    dist.all_gather_single(parts, x.contiguous(), group=group)
    return parts.view(ranks, *x.shape).movedim(0, -2).flatten(-2)


def features_to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All features of this rank's tokens: [..., T, D / ranks] -> [..., T / ranks, D].

    The last ranks' tokens are filled up with zeros where T does not divide.
    """
    ranks, rows = dist.get_world_size(group), shard_size(x.shape[-2], group)
    sent = pad_tokens(x, rows * ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    mine = received.view(ranks, rows, -1).movedim(0, 1).flatten(1)
    return mine.view(*x.shape[:-2], *mine.shape)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        group: dist.ProcessGroup,
        to_shards: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.to_shards = group, to_shards
        part = F.linear(gather_features(x, group), weight)
        return (features_to_tokens if to_shards else gather_features)(part, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        group = ctx.group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        if ctx.to_shards:
            grad = gather_tokens(grad, x.shape[-2], group)
        whole = weight.new_empty(ranks * len(weight), weight.shape[1])
        dist.all_gather_single(whole, weight.contiguous(), group=group)
        grad_x = grad @ whole.chunk(ranks, 1)[rank]
        rows, mine = gather_features(x, group).flatten(0, -2), grad.chunk(ranks, -1)[rank]
        return grad_x, mine.flatten(0, -2).t() @ rows, None, None


def gathered_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    to_shards: bool = False,
) -> torch.Tensor:
    """x @ weight^T where a rank has a part of x's input features and of the weight's outputs.

    x: [..., T, K / ranks]; weight: [N / ranks, K]. Returns [..., T, N] on every rank; `to_shards`
    (sequence parallelism): all features of this rank's tokens, [..., T / ranks, N].
    """
    return _GatheredLinear.apply(x, weight, group, to_shards)
