"""Self-test of the row-wise operations other than matrix products: each on a few rows alone, and
on the same rows within a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mesh.invariant.selftest import Comparisons
from mesh.model.attention import (
    CPU_PAGE,
    CUDA_PAGE,
    AttentionContext,
    KVCache,
    attention,
    packed_context,
)
from mesh.model.layers import rms_norm, rotate_both, swiglu
from mesh.model.rope import rope_table
from mesh.types import ModelShape

LENGTHS = (3, 40, 300)  # of sequences; on CPU more than 256 keys span several blocks
PARTS = (slice(0, 1), slice(5, 12), slice(100, 133))


@torch.no_grad()
def compared_rows(
    shape: ModelShape, max_tp: int, dtype: torch.dtype, device: torch.device
) -> Comparisons:
    """Compare RMSNorm, SwiGLU, RoPE and attention at the model's sizes, on up to `max_tp` ranks."""
    draw = torch.Generator(device).manual_seed(0)

    def rows(*size: int) -> torch.Tensor:
        return torch.randn(sum(LENGTHS), *size, generator=draw, device=device).to(dtype)

    x, weight = rows(shape.dim), rows(shape.dim)[0]
    gate, up = rows(shape.ffn_dim), rows(shape.ffn_dim)
    q, k = rows(shape.num_heads, shape.head_dim), rows(shape.num_kv_heads, shape.head_dim)
    table = rope_table(shape.head_dim, len(x), shape.rope_theta, device, shape.rope_scaling)
    normed, gated = rms_norm(x, weight, shape.norm_eps), swiglu(gate, up)
    rotated = rotate_both(q[None], k[None], table)[0]
    for part in PARTS:
        yield "RMSNorm", rms_norm(x[part], weight, shape.norm_eps), normed[part]
        yield "SwiGLU", swiglu(gate[part], up[part]), gated[part]
        some = rotate_both(q[None, part], k[None, part], table[part])[0]
        yield "RoPE", some, rotated[:, part]
    v = rows(shape.num_kv_heads, shape.head_dim)
    yield from attention_rows(q, k, v)
    yield from shared_heads(q, k, v, max_tp)


def attention_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Comparisons:
    """Compare each sequence alone, and its last token decoded from pages, with the packed batch."""
    scale = q.shape[-1] ** -0.5
    bounds = torch.tensor([0, *LENGTHS], device=q.device).cumsum(0).int()
    packed = attention(q, k, v, packed_context(bounds, max(LENGTHS)), 0, scale)
    for part, length in spans():
        alone = packed_context(bounds.new_tensor([0, length]), length)
        result = attention(q[part], k[part], v[part], alone, 0, scale)
        yield f"attention, {length} tokens alone", result, packed[part]
        last = slice(part.stop - 1, part.stop)
        context = decode_context(k[part], v[part])
        result = attention(q[last], k[last], v[last], context, 0, scale)
        yield f"attention, token {length} decoded", result, packed[last]


def shared_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_tp: int) -> Comparisons:
    """Compare the queries of ranks that share a kv head with all that the head has."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scale, bounds = q.shape[-1] ** -0.5, torch.tensor([0, *LENGTHS], device=q.device).cumsum(0)
    context = packed_context(bounds.int(), max(LENGTHS))
    whole = attention(q, k, v, context, 0, scale)
    for tp in range(kv_heads + 1, max_tp + 1):
        if tp % kv_heads or heads % tp:
            continue
        own = slice(0, heads // tp)
        mine, key, value = (x.contiguous() for x in (q[:, own], k[:, :1], v[:, :1]))
        result = attention(mine, key, value, context, 0, scale)
        yield f"attention of one kv head on {tp} ranks", result, whole[:, own]


def spans() -> Iterator[tuple[slice, int]]:
    """(slice of the packed rows, length) of each sequence."""
    first = 0
    for length in LENGTHS:
        yield slice(first, first + length), length
        first += length


def decode_context(k_LKH: torch.Tensor, v_LKH: torch.Tensor) -> AttentionContext:
    """Context of decoding the last token, with the earlier keys and values in pages."""
    length, device = len(k_LKH), k_LKH.device
    page = CUDA_PAGE if k_LKH.is_cuda else CPU_PAGE
    pages = -(-length // page)
    caches = []
    for x in (k_LKH, v_LKH):
        cache = x.new_zeros(pages, page, *x.shape[1:])
        cache.flatten(0, 1)[: length - 1] = x[:-1]
        caches.append([cache])
    return AttentionContext(
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
        lengths=torch.tensor([length], dtype=torch.int32, device=device),
        max_query=1,
        max_length=pages * page,
        cache=KVCache(*caches),
        block_table=torch.arange(pages, dtype=torch.int32, device=device)[None],
        slots_T=torch.tensor([length - 1], device=device),
    )
