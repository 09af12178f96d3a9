"""The rows of an embedding, with a gradient whose sums have one order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mesh.invariant.switch import current


def lookup(tokens: torch.Tensor, weight: torch.Tensor, pad_row: int | None = None) -> torch.Tensor:
    """Rows of `weight` by token. With batch invariance on CUDA the gradient has one order of sums,
    which PyTorch's has not from some 4,000 tokens on.

    pad_row: the row whose gradient is zero, as with `padding_idx` of torch's Embedding.
    """
    assert pad_row is None or 0 <= pad_row < len(weight), f"row {pad_row} of {len(weight)}"
    if current() is None or not weight.is_cuda:
        return F.embedding(tokens, weight, pad_row)
    return OrderedLookup.apply(tokens, weight, pad_row)


class OrderedLookup(torch.autograd.Function):
    """F.embedding, whose gradient sums the rows of each token in fp32 in the order of a stable sort
    (`index_put_` with accumulate on CUDA).
    """

    COLUMNS = 1024  # summed at once: bounds the fp32 copy of a large vocabulary's gradient

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, pad_row: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows, ctx.pad_row = len(weight), pad_row
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:  # type: ignore[override]
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
        if ctx.pad_row is not None:
            found[ctx.pad_row].zero_()
        return None, found, None
