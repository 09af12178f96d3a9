"""Packed causal attention for CUDA whose bits, gradients included, depend on the sequence alone.

The forward is `triton_flash`'s; this is its backward. FlashAttention's accumulates dQ with atomics,
so its bits differ from run to run, and its deterministic mode depends on the packing. Here two
kernels replace it. One owns a block of queries and walks its keys (dQ); the other owns a block of
keys and walks the queries of every head in its group (dK, dV). Blocks are aligned to the start of
each sequence, every sum has one order, and there are no atomics: a sequence's gradients have the
same bits at any offset, next to any other sequences.

The price is seven products instead of five, since both kernels recompute scores and dP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from mesh.invariant.triton_flash import attention_forward

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class BackwardBlocks:
    """Tile of one kernel. Queries and keys fix the order of the sums: never autotuned."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# by head dim, tuned on an H100
DQ_BLOCKS = {
    32: BackwardBlocks(128, 64, 4, 3),
    64: BackwardBlocks(128, 64, 8, 3),
    128: BackwardBlocks(128, 64, 8, 3),
}
DKDV_BLOCKS = {
    32: BackwardBlocks(64, 128, 4, 3),
    64: BackwardBlocks(64, 128, 8, 3),
    128: BackwardBlocks(64, 128, 8, 3),
}


@triton.jit
def _load_rows(
    pointer, first, length, stride, ROWS: tl.constexpr, H: tl.constexpr, INSIDE: tl.constexpr
):
    """[ROWS, H] from row `first`; rows from `length` on read as zeros, unless all are INSIDE."""
    rows = first + tl.arange(0, ROWS)[:, None]
    places = pointer + rows * stride + tl.arange(0, H)[None]
    if INSIDE:
        return tl.load(places)
    else:
        return tl.load(places, mask=rows < length, other=0.0)


@triton.jit
def _dq_step(
    dq, q, grad_out, lse, delta, k_pointer, v_pointer, first_query, first_key, length, k_stride,
    v_stride, log2_scale, DIAGONAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Add the contribution of N keys to the dQ of M queries. lse is in base 2."""
    k = _load_rows(k_pointer, first_key, length, k_stride, N, H, not DIAGONAL)
    v = _load_rows(v_pointer, first_key, length, v_stride, N, H, not DIAGONAL)
    scores = tl.dot(q, tl.trans(k))
    grad_p = tl.dot(grad_out, tl.trans(v))
    p = tl.exp2(scores * log2_scale - lse[:, None])
    if DIAGONAL:
        keys = first_key + tl.arange(0, N)[None]
        p = tl.where(keys <= first_query + tl.arange(0, M)[:, None], p, 0.0)
    grad_scores = p * (grad_p - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["tokens"])
def _dq_kernel(
    q, k, v, out, grad_out, lse, delta, dq, cu_seqlens, q_stride, q_head, k_stride, k_head,
    v_stride, v_head, tokens, scale, log2_scale,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """dQ of M queries of one head, and their delta = sum(dO * O), which `_dkdv_kernel` reads.

    Blocks are launched last to first: the last ones have the most keys.
    """
    head, sequence = tl.program_id(0), tl.program_id(1)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * M
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if first >= length:
        return
    row = tl.num_programs(0) * H
    place = start * row + head * H
    q_MH = _load_rows(q + start * q_stride + head * q_head, first, length, q_stride, M, H, False)
    out_MH = _load_rows(out + place, first, length, row, M, H, False)
    grad_MH = _load_rows(grad_out + place, first, length, row, M, H, False)
    queries = first + tl.arange(0, M)
    inside = queries < length
    lse_index = head * tokens.to(tl.int64) + start + queries
    delta_M = tl.sum(out_MH.to(tl.float32) * grad_MH.to(tl.float32), 1)
    tl.store(delta + lse_index, delta_M, mask=inside)
    lse_M = tl.load(lse + lse_index, mask=inside, other=0.0) * LOG2_E
    k += start * k_stride + head // GROUP * k_head
    v += start * v_stride + head // GROUP * v_head
    dq_MH = tl.zeros([M, H], tl.float32)
    diagonal = first // N * N
    for key in range(0, diagonal, N):
        dq_MH = _dq_step(
            dq_MH, q_MH, grad_MH, lse_M, delta_M, k, v, first, key, length, k_stride, v_stride,
            log2_scale, False, M, N, H,
        )  # fmt: skip
    for key in range(diagonal, tl.minimum(first + M, length), N):
        dq_MH = _dq_step(
            dq_MH, q_MH, grad_MH, lse_M, delta_M, k, v, first, key, length, k_stride, v_stride,
            log2_scale, True, M, N, H,
        )  # fmt: skip
    places = queries[:, None] * row + tl.arange(0, H)[None]
    tl.store(dq + place + places, (dq_MH * scale).to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q, grad_out, lse, delta, step, first_key, length, q_stride, q_head, row, tokens,
    log2_scale, DIAGONAL: tl.constexpr, GROUP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Add the contribution of M queries to the dK, dV of N keys.

    Step i is block i // GROUP of head i % GROUP. Rows beyond the sequence, dO's too, read as zeros
    and add nothing.
    """
    first, head = step // GROUP * M, step % GROUP
    q_MH = _load_rows(q + head * q_head, first, length, q_stride, M, H, False)
    grad_MH = _load_rows(grad_out + head * H, first, length, row, M, H, False)
    queries = first + tl.arange(0, M)
    lse_index = head * tokens + queries
    scores = tl.dot(k, tl.trans(q_MH))
    grad_p = tl.dot(v, tl.trans(grad_MH))
    lse_M = tl.load(lse + lse_index, mask=queries < length, other=0.0) * LOG2_E
    p = tl.exp2(scores * log2_scale - lse_M[None])
    if DIAGONAL:
        p = tl.where(first_key + tl.arange(0, N)[:, None] <= queries[None], p, 0.0)
    dv = tl.dot(p.to(grad_MH.dtype), grad_MH, dv)
    delta_M = tl.load(delta + lse_index, mask=queries < length, other=0.0)
    grad_scores = p * (grad_p - delta_M[None])
    return tl.dot(grad_scores.to(q_MH.dtype), q_MH, dk), dv


@triton.jit(do_not_specialize=["tokens"])
def _dkdv_kernel(
    q, k, v, grad_out, lse, delta, dk, dv, cu_seqlens, q_stride, q_head, k_stride, k_head,
    v_stride, v_head, tokens, scale, log2_scale,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """dK and dV of N keys of one kv head, over the queries of all heads of its group.

    Blocks are launched first to last: the first ones have the most queries.
    """
    kv_head, sequence, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * N
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if first >= length:
        return
    kv_row = tl.num_programs(0) * H
    row = kv_row * GROUP
    head = kv_head * GROUP
    k_NH = _load_rows(k + start * k_stride + kv_head * k_head, first, length, k_stride, N, H, False)
    v_NH = _load_rows(v + start * v_stride + kv_head * v_head, first, length, v_stride, N, H, False)
    q += start * q_stride + head * q_head
    grad_out += start * row + head * H
    tokens = tokens.to(tl.int64)
    lse += head * tokens + start
    delta += head * tokens + start
    dk_NH, dv_NH = tl.zeros([N, H], tl.float32), tl.zeros([N, H], tl.float32)
    diagonal = tl.cdiv(tl.minimum(first + N, length), M)
    for step in range(first // M * GROUP, diagonal * GROUP):
        dk_NH, dv_NH = _dkdv_step(
            dk_NH, dv_NH, k_NH, v_NH, q, grad_out, lse, delta, step, first, length, q_stride,
            q_head, row, tokens, log2_scale, True, GROUP, M, N, H,
        )  # fmt: skip
    for step in range(diagonal * GROUP, tl.cdiv(length, M) * GROUP):
        dk_NH, dv_NH = _dkdv_step(
            dk_NH, dv_NH, k_NH, v_NH, q, grad_out, lse, delta, step, first, length, q_stride,
            q_head, row, tokens, log2_scale, False, GROUP, M, N, H,
        )  # fmt: skip
    keys = first + tl.arange(0, N)[:, None]
    places = start * kv_row + kv_head * H + keys * kv_row + tl.arange(0, H)[None]
    tl.store(dk + places, (dk_NH * scale).to(dk.dtype.element_ty), mask=keys < length)
    tl.store(dv + places, dv_NH.to(dv.dtype.element_ty), mask=keys < length)


def attention_backward(
    grad_out_TNH: torch.Tensor,
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    out_TNH: torch.Tensor,
    lse_NT: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ [T, N, H], dK and dV [T, K, H] of causal attention over packed whole sequences.

    lse_NT: fp32, natural logarithm of the sum of exp(scale * score), from the forward; cu_seqlens:
    int32 [S + 1]; max_seqlen: at least the longest sequence. q, k and v may be views with a
    contiguous last dim. Sums are in fp32; equations of FlashAttention-2 (arXiv:2307.08691,
    algorithm 2).
    """
    tokens, heads, head_dim = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    assert head_dim in DQ_BLOCKS, f"head dim {head_dim} is not one of {list(DQ_BLOCKS)}"
    assert heads % kv_heads == 0 and lse_NT.shape == (heads, tokens)
    assert all(x.stride(-1) == 1 for x in (q_TNH, k_TKH, v_TKH))
    assert not q_TNH.is_cuda or q_TNH.dtype != torch.float32, "fp32 products would be TF32"
    grad_out_TNH, out_TNH, lse_NT = (x.contiguous() for x in (grad_out_TNH, out_TNH, lse_NT))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_TNH, k_TKH, v_TKH))
    delta_NT = torch.empty_like(lse_NT)
    strides = [x.stride(dim) for x in (q_TNH, k_TKH, v_TKH) for dim in (0, 1)]
    assert max_seqlen * max(strides) < 2**31, "offsets in a sequence must fit int32"
    scalars = (*strides, tokens, scale, scale * LOG2_E.value, heads // kv_heads)
    sequences = len(cu_seqlens) - 1

    blocks = DQ_BLOCKS[head_dim]
    _dq_kernel[heads, sequences, triton.cdiv(max_seqlen, blocks.queries)](
        q_TNH, k_TKH, v_TKH, out_TNH, grad_out_TNH, lse_NT, delta_NT, dq, cu_seqlens, *scalars,
        blocks.queries, blocks.keys, head_dim,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    blocks = DKDV_BLOCKS[head_dim]
    _dkdv_kernel[kv_heads, sequences, triton.cdiv(max_seqlen, blocks.keys)](
        q_TNH, k_TKH, v_TKH, grad_out_TNH, lse_NT, delta_NT, dk, dv, cu_seqlens, *scalars,
        blocks.queries, blocks.keys, head_dim,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    return dq, dk, dv


class VarlenAttention(torch.autograd.Function):
    """`attention_forward` with the backward above."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
    ) -> torch.Tensor:
        out_TNH, lse_NT = attention_forward(
            q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, scale, with_lse=True
        )
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, cu_seqlens)
        ctx.max_seqlen, ctx.scale = max_seqlen, scale
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_out_TNH: torch.Tensor) -> tuple[Any, ...]:
        q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, cu_seqlens = ctx.saved_tensors
        grads = attention_backward(
            grad_out_TNH, q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, cu_seqlens,
            ctx.max_seqlen, ctx.scale,
        )  # fmt: skip
        return *grads, None, None, None


def varlen_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """Causal grouped-query attention of packed whole sequences on CUDA. Returns [T, N, H].

    The bits of output and gradients are reproducible and depend on the sequence alone; the output
    has the bits that `attention_forward` gives with a KV cache.
    """
    return VarlenAttention.apply(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, scale)
