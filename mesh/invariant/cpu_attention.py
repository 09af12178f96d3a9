"""CPU attention whose bits for a query depend neither on the other queries nor on how far the keys
of the call extend beyond it.

PyTorch's CPU kernel multiplies a tile of queries at a time and sums over keys in an order that
depends on their number, from about 256 on, and on the number of threads. So it is called with one
query and at most BLOCK keys, as in a decode step, and blocks are merged in order by their
log-sum-exps (as in ring attention, arXiv:2310.01889, eq. 2). Queries or sequences, whichever are
more, form the batch of a call. The backward pass is one call with the merged output and
log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch

KEYS = 32  # keys are padded to a multiple of this
BLOCK = 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Tensors = tuple[torch.Tensor, torch.Tensor]


def _by_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor,
               scale: float) -> Tensors:  # fmt: skip
    """(output, log-sum-exp) of one-query calls. Masked keys add exact zeros."""
    if q.shape[0] * q.shape[1] == 1:  # threads split a single product, which rounds differently
        q, k, v, bias = (x.expand(2, -1, -1, -1) for x in (q, k, v, bias))
        out, logsumexp = _by_blocks(q, k, v, bias, scale)
        return out[:1], logsumexp[:1]
    parts = [
        _forward(q, *(x[:, :, first : first + BLOCK] for x in (k, v)),
                 attn_mask=bias[..., first : first + BLOCK], scale=scale)
        for first in range(0, k.shape[2], BLOCK)
    ]  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    seen = torch.stack([part.isfinite().any(-1) for part in bias.split(BLOCK, -1)])
    logsumexps = torch.stack([lse for _, lse in parts]).masked_fill(~seen, -torch.inf)
    peak = logsumexps.amax(0)
    terms = (logsumexps - peak).exp()
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    shares = (terms / total)[..., None]
    out = parts[0][0].float() * shares[0]  # every query sees the first key
    for (part, _), share in zip(parts[1:], shares[1:], strict=True):
        out += torch.where(share > 0, part.float() * share, 0.0)
    return out.to(q.dtype), peak + total.log()


def _over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor,
                  scale: float) -> Tensors:  # fmt: skip
    """One call per query, batched over the sequences."""
    parts = [
        _by_blocks(row, k, v, seen, scale)
        for row, seen in zip(q.split(1, 2), bias.split(1, 2), strict=True)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _over_sequences(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor,
                    scale: float) -> Tensors:  # fmt: skip
    """One call per sequence, batched over its queries, which share its keys."""
    outs, logsumexps = [], []
    for q_NLH, *kv, seen in zip(q, k, v, bias, strict=True):
        rows = q_NLH.transpose(0, 1)[:, :, None]
        keys, values = (x.expand(len(rows), -1, -1, -1) for x in kv)
        out, lse = _by_blocks(rows, keys, values, seen.transpose(0, 1)[:, :, None], scale)
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
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """Grouped-query attention with an additive mask. Returns [S, N, L, H].

    q: [S, N, L, H]; k, v: [S, K, keys, H], keys a multiple of KEYS; bias: [S, 1, L, keys] in q's
    dtype, 0 where a query sees a key and -inf elsewhere; every query sees a key.
    """
    assert k.shape[2] % KEYS == 0, f"keys must be padded to a multiple of {KEYS}"
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return _AttentionByQuery.apply(q, k, v, bias, scale)
