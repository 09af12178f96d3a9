"""The rows of an embedding, with a gradient whose sums have one order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mesh.invariant.switch import current


def lookup(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of `weight` by token. With batch invariance on CUDA the gradient has one order of sums,
    which PyTorch's has not from some 4,000 tokens on.
    """
    if current() is None or not weight.is_cuda:
        return F.embedding(tokens, weight)
    return OrderedLookup.apply(tokens, weight)


class OrderedLookup(torch.autograd.Function):
    """F.embedding, whose gradient sums the rows of each token in fp32 in the order of a stable sort
    (`index_put_` with accumulate on CUDA).
    """

    COLUMNS = 1024  # summed at once: bounds the fp32 copy of a large vocabulary's gradient

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows = len(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        found = grad.new_empty(ctx.num_rows, grad.shape[-1])
        for part, into in zip(
            rows.split(OrderedLookup.COLUMNS, -1),
            found.split(OrderedLookup.COLUMNS, -1),
            strict=True,
        ):
            sums = torch.zeros(into.shape, dtype=torch.float32, device=grad.device)
            into.copy_(sums.index_put_((tokens.flatten(),), part.float(), accumulate=True))
        return None, found
