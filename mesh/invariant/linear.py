"""The linear layer that ends a tensor-parallel region, with the same bits at any degree: nothing
is summed across ranks.

Each rank computes a share of the output features, each as one full sum over all input features.
Where Megatron's row-parallel layer (arXiv:1909.08053) all-reduces partial sums, this one
all-gathers its inputs and then its outputs: about the bytes of an all-reduce, with nothing to round
or to order, and free on one rank. (Summing fixed chunks of the input features, to be combined by an
ordered all-reduce, doubles the layer's time on a GPU at any degree.) The backward pass gathers the
weight for the same reason.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.invariant.collectives import gather_tokens, pad_tokens, shard_size


def gather_features(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' features, in rank order: [..., D / ranks] -> [..., D]."""
    ranks = dist.get_world_size(group)
    parts = x.new_empty(ranks * len(x), *x.shape[1:])
    dist.all_gather_single(parts, x.contiguous(), group=group)
    return parts.view(ranks, *x.shape).movedim(0, -2).flatten(-2)


def features_to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-to-all from feature to token shards: [..., T, D / ranks] -> [..., T / ranks, D].

    The last ranks' tokens are zero-padded where T does not divide.
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
    """x @ weight^T for x sharded over input features and weight over output features.

    x: [..., T, K / ranks]; weight: [N / ranks, K]. Returns [..., T, N] on every rank, or with
    `to_shards` (sequence parallelism) this rank's tokens, [..., T / ranks, N].
    """
    return _GatheredLinear.apply(x, weight, group, to_shards)
