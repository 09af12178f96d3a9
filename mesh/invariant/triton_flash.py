"""Causal attention forward in Triton for Hopper GPUs: one order over the keys for every query.

Training, prefill, chunked prefill and decode run one kernel. Keys are walked from a sequence's
first one in blocks of fixed size, with FlashAttention's online softmax, and nothing else enters a
row: blocks beyond its diagonal leave it bitwise unchanged, and sums inside a block follow a tree
that depends on neither the tile nor the thread layout. So query tiles may have any size.

The query heads of a kv head share a tile, which reads each key once for all of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

KEYS = {32: 64, 64: 64, 128: 64}
"""Keys per block, by head dim: fixes the order of the sums, so never autotuned."""

COLUMNS = 32
"""Partial sums of p kept per row until the end; part of the order as well."""


class Tile(NamedTuple):
    """Rows (queries times heads of a group) per program and launch settings; changes no bits."""

    rows: int
    warps: int
    stages: int


# smallest first: a launch takes the first that fits its longest span, else the last
TILES = {
    32: (Tile(16, 4, 3), Tile(64, 4, 3), Tile(128, 8, 3)),
    64: (Tile(16, 4, 4), Tile(64, 4, 3), Tile(128, 8, 3)),
    128: (Tile(16, 2, 4), Tile(64, 4, 3)),
}


def tile_of(rows: int, head_dim: int) -> Tile:
    """The tile for spans of at most `rows` rows."""
    tiles = TILES[head_dim]
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


@triton.jit
def _fold(x):
    """Add the right half to the left: [M, C] -> [M, C / 2]."""
    M: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.sum(tl.reshape(x, (M, 2, HALF)), 1)


@triton.jit
def _step(
    acc, total, top, q, k, v, key, position, seen_by_all, log2_scale, HALVINGS: tl.constexpr
):  # fmt: skip
    """Accumulate the block of keys k, v [N, H] that starts at `key`.

    acc [M, H] and total [M, COLUMNS] are in units of 2 ** top. FMAs are explicit, so that the
    compiler does not choose them. In a row that sees none of the block, p is 0 and `rescale` is 1.
    """
    scores = tl.dot(q, tl.trans(k))
    if key + k.shape[0] > seen_by_all:
        keys = key + tl.arange(0, k.shape[0])
        scores = tl.where(keys[None] <= position[:, None], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
    p = tl.exp2(tl.fma(scores, log2_scale, -new_top[:, None]))
    rescale = tl.exp2(top - new_top)
    part = p
    for _ in tl.static_range(HALVINGS):
        part = _fold(part)
    total = tl.fma(total, rescale[:, None], part)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
    return acc, total, new_top


@triton.jit
def _row_of(table, key, start, length, PAGE: tl.constexpr):
    """Row of k and v at which the block of keys that starts at `key` is stored.

    A block past the end has no page and gets the last one.
    """
    if PAGE:
        return tl.load(table + tl.minimum(key, length - 1) // PAGE) * PAGE + key % PAGE
    else:
        return start + key


@triton.jit
def _tail(rows, row, stride, column, count, N: tl.constexpr, H: tl.constexpr):
    """[N, H] from `row`; zeros after `count` rows, since 0 times stale memory may be NaN."""
    offsets = tl.arange(0, N)[:, None]
    places = rows + (row.to(tl.int64) + offsets) * stride + column + tl.arange(0, H)[None]
    return tl.load(places, mask=offsets < count, other=0.0)


@triton.jit
def _store(
    out, lse, acc, total, top, row, head, heads, inside, tokens,
    STORE_LSE: tl.constexpr, LAST_HALVINGS: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Write acc / total to out [T, N, H], and the log of the sum of exp(scale * score) to lse."""
    for _ in tl.static_range(LAST_HALVINGS):
        total = _fold(total)
    total_M = tl.reshape(total, (M,))
    result = (acc / total_M[:, None]).to(out.dtype.element_ty)
    places = ((row * heads + head) * H)[:, None] + tl.arange(0, H)[None]
    tl.store(out + places, result, mask=inside[:, None])
    if STORE_LSE:
        tl.store(lse + head * tokens + row, (top + tl.log2(total_M)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _attention_kernel(
    q, k_rows, v_rows, k, v, out, lse, cu_seqlens, lengths, table, q_stride, q_head, k_stride,
    v_stride, table_stride, tokens, log2_scale, STORE_LSE: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    HALVINGS: tl.constexpr, LAST_HALVINGS: tl.constexpr,
):  # fmt: skip
    """M rows of one kv head: row r is query r // GROUP of head r % GROUP of its group.

    Tiles are launched last to first: the last rows of a span have the most keys.
    """
    kv_head, sequence = tl.program_id(0), tl.program_id(1)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * M
    start = tl.load(cu_seqlens + sequence)
    queries = tl.load(cu_seqlens + sequence + 1) - start
    if first >= queries * GROUP:
        return
    length = queries
    if PAGE:
        length = tl.load(lengths + sequence)
        table += sequence.to(tl.int64) * table_stride
    query_M = (first + tl.arange(0, M)) // GROUP
    head_M = kv_head * GROUP + (first + tl.arange(0, M)) % GROUP
    inside_M = query_M < queries
    row_M = start.to(tl.int64) + query_M
    places = (row_M * q_stride + head_M * q_head)[:, None] + tl.arange(0, H)[None]
    q_MH = tl.load(q + places, mask=inside_M[:, None], other=0.0)
    position_M = length - queries + query_M
    seen_by_all = length - queries + first // GROUP + 1
    end = tl.minimum(length - queries + (first + M - 1) // GROUP + 1, length)
    acc = tl.zeros([M, H], tl.float32)
    total = tl.zeros([M, N >> HALVINGS], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    whole = tl.minimum(tl.cdiv(end, N), length // N) * N
    column = kv_head * H
    row = _row_of(table, 0, start, length, PAGE)
    for key in range(0, whole, N):
        k_NH = k_rows.load([row, column])
        v_NH = v_rows.load([row, column])
        acc, total, top = _step(
            acc, total, top, q_MH, k_NH, v_NH, key, position_M, seen_by_all, log2_scale, HALVINGS
        )  # fmt: skip
        row = _row_of(table, key + N, start, length, PAGE)
    if whole < end:
        k_NH = _tail(k, row, k_stride, column, length - whole, N, H)
        v_NH = _tail(v, row, v_stride, column, length - whole, N, H)
        acc, total, top = _step(
            acc, total, top, q_MH, k_NH, v_NH, whole, position_M, seen_by_all, log2_scale, HALVINGS
        )  # fmt: skip
    _store(
        out, lse, acc, total, top, row_M, head_M, tl.num_programs(0) * GROUP, inside_M,
        tokens.to(tl.int64), STORE_LSE, LAST_HALVINGS, M, H,
    )  # fmt: skip


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """[rows, K, H] as [rows, K * H] for a descriptor; a copy where its strides rule that out."""
    plain = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    rows = x if plain and aligned else x.clone(memory_format=torch.contiguous_format)
    return rows.flatten(1)


def attention_forward(
    q_TNH: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_query: int,
    scale: float,
    lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal grouped-query attention of packed spans, each the end of its sequence.

    k, v: [T, K, H] where spans are whole sequences; with lengths int32 [S] and block_table int32
    [S, pages], the pages [num_pages, page_size, K, H] of a cache. cu_seqlens: int32 [S + 1], starts
    of the spans; max_query: at least the longest span. Returns out [T, N, H] and, `with_lse`, the
    natural logarithm of the sum of exp(scale * score), fp32 [N, T] (otherwise empty). Sums are in
    fp32; equations of FlashAttention-2 (arXiv:2307.08691, algorithm 1).
    """
    tokens, heads, head_dim = q_TNH.shape
    page = 0 if block_table is None else k.shape[1]
    k_rows, v_rows = (_rows_of(x.flatten(0, 1) if page else x) for x in (k, v))
    kv_heads = k.shape[-2]
    keys = KEYS.get(head_dim, 0)
    assert keys, f"head dim {head_dim} is not one of {list(KEYS)}"
    assert page % keys == 0, f"page size {page} is not a multiple of {keys}"
    assert heads % kv_heads == 0 and scale > 0 and q_TNH.stride(-1) == 1
    assert not q_TNH.is_cuda or q_TNH.dtype != torch.float32, "fp32 products would be TF32"
    group = heads // kv_heads
    tile = tile_of(max_query * group, head_dim)
    table_stride = 0 if block_table is None else block_table.stride(0)
    out = q_TNH.new_empty(q_TNH.shape)
    lse_NT = q_TNH.new_empty((heads, tokens) if with_lse else 0, dtype=torch.float32)
    grid = (kv_heads, len(cu_seqlens) - 1, triton.cdiv(max_query * group, tile.rows))
    _attention_kernel[grid](
        q_TNH, *(_descriptor(x, keys, head_dim) for x in (k_rows, v_rows)), k_rows, v_rows, out,
        lse_NT, cu_seqlens, lengths, block_table, q_TNH.stride(0), q_TNH.stride(1),
        k_rows.stride(0), v_rows.stride(0), table_stride, tokens, scale * LOG2_E,
        with_lse, page, group, tile.rows, keys, head_dim,
        (keys // COLUMNS).bit_length() - 1, COLUMNS.bit_length() - 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse_NT


def _descriptor(rows: torch.Tensor, keys: int, head_dim: int) -> TensorDescriptor:
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [keys, head_dim])
