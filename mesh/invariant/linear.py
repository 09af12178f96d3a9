"""Linear layers whose bits do not depend on the tensor-parallel degree.

Output features are computed in `chunks` fixed tiles, whatever part of them a rank holds. Input
features are summed in `chunks` fixed pieces: partial products in fp32, added along one binary tree
whose upper levels are the ranks, rounded to the activations' dtype once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def column_linear(x: torch.Tensor, weight: torch.Tensor, tiles: int) -> torch.Tensor:
    """x @ weight^T in `tiles` tiles of output features."""
    return torch.cat([F.linear(x, tile) for tile in weight.chunk(tiles)], dim=-1)


def add_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum of a power of two of tensors along a balanced binary tree, neighbours first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _partial(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight^T in fp32: products of bf16 are exact in it."""
    if x.is_cuda and x.dtype != torch.float32:
        rows = x.flatten(0, -2)
        rows = rows if len(rows) > 1 else F.pad(rows, (0, 0, 0, 1))
        product = torch.mm(rows, weight.t(), out_dtype=torch.float32)
        return product[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)
    return F.linear(x.float(), weight.float())


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        pieces: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        pairs = zip(x.chunk(pieces, -1), weight.chunk(pieces, -1), strict=True)
        total = add_tree([_partial(a, b) for a, b in pairs])
        if group is not None:
            parts = [torch.empty_like(total) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, total.contiguous(), group=group)
            total = add_tree(parts)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        return grad @ weight, grad_rows.t() @ rows, None, None


def row_linear(
    x: torch.Tensor, weight: torch.Tensor, chunks: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The sum over all ranks of x @ weight^T, where each has a part of the input features.

    x: [..., K / ranks]; weight: [N, K / ranks]. `chunks` pieces over all ranks together.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    return _RowLinear.apply(x, weight, chunks // ranks, group)
