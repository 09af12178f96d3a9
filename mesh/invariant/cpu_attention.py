"""Attention on a CPU whose bits for a query do not depend on the other queries, nor on how far the
keys of its call reach beyond it.

PyTorch's CPU kernel multiplies a tile of queries at a time, and from about 256 keys on the other
rows of a tile and the number of keys show in a row's bits, in tiles of one fixed size too. With one
query to a product they do not. (Measured, fp32 and bf16, 1 to 4 threads, keys to 1,184.) It is what a
decode step does anyway. The backward pass takes the output and log-sum-exp of all, in one call.
"""

from __future__ import annotations

from typing import Any

import torch

KEYS = 32  # keys are padded to a multiple

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Tensors = tuple[torch.Tensor, torch.Tensor]


def _over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor,
                  scale: float) -> Tensors:  # fmt: skip
    """One call a query, with the sequences as its batch."""
    parts = [
        _forward(row, k, v, attn_mask=seen, scale=scale)
        for row, seen in zip(q.split(1, 2), bias.split(1, 2), strict=True)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _over_sequences(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor,
                    scale: float) -> Tensors:  # fmt: skip
    """One call a sequence, with its queries as the batch, which all read the same keys."""
    outs, logsumexps = [], []
    for q_NLH, *kv, seen in zip(q, k, v, bias, strict=True):
        rows = q_NLH.transpose(0, 1)[:, :, None]
        pair = (x.expand(len(rows), -1, -1, -1) for x in kv)
        out, lse = _forward(rows, *pair, attn_mask=seen.transpose(0, 1)[:, :, None], scale=scale)
        outs.append(out[:, :, 0].transpose(0, 1))
        logsumexps.append(lse[:, :, 0].transpose(0, 1))
    return torch.stack(outs), torch.stack(logsumexps)


class _AttentionByQuery(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        loop = _over_queries if q.shape[2] <= len(q) else _over_sequences
        out, logsumexp = loop(q, k, v, bias, scale)
        ctx.save_for_backward(q, k, v, bias, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, bias, out, logsumexp = ctx.saved_tensors
        grads = _backward(
            grad, q, k, v, out, logsumexp, 0.0, False, attn_mask=bias, scale=ctx.scale
        )
        return *grads, None, None


def attention_by_query(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Grouped-query attention where `mask` is true. Returns [S, N, L, H].

    q: [S, N, L, H]; k, v: [S, K, keys, H], keys a multiple of KEYS; mask: bool [S, 1, L, keys], in
    which every query sees a key.
    """
    assert k.shape[2] % KEYS == 0, "keys are not padded"
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return _AttentionByQuery.apply(q, k, v, mask, scale)
