"""Attention over packed sequences, with and without a paged KV cache: one function for both roles.

A batch is a row of spans, one per sequence: the new tokens at its end. Without a cache (training)
these are the whole sequence. With one, they are written to the cache first, and keys and values are
read from its pages, for prefill, chunked prefill and decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torchtitan.protocols.module import Module

from mesh.invariant.cpu_attention import KEYS, attention_by_query
from mesh.invariant.switch import current

HEAD_DIMS = (32, 64, 128)
"""Head dims of our attention kernels for Hopper GPUs."""

CUDA_PAGE = 256
"""Tokens of a KV page on CUDA, whose attention kernel takes multiples of this alone."""

CPU_PAGE = 16
"""Tokens of a KV page on a CPU, where any number will do."""


@dataclass(frozen=True)
class KVCache:
    """Pages of keys and values: one [num_pages, page_size, K, H] pair per layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[1]


@dataclass
class AttentionContext:
    """Placement of a forward pass's tokens in their sequences and in the KV cache.

    cu_seqlens: int32 [S + 1], starts of the spans in the packed row; lengths: int32 [S], tokens per
    sequence, span included; max_query, max_length: at least the largest span and length. With a
    cache: block_table int32 [S, pages] and slots_T int64, the flat slot of each new token.
    """

    cu_seqlens: torch.Tensor
    lengths: torch.Tensor
    max_query: int
    max_length: int
    cache: KVCache | None = None
    block_table: torch.Tensor | None = None
    slots_T: torch.Tensor | None = None

    @cached_property
    def keys(self) -> int:
        """Keys per padded sequence."""
        keys = self.max_query
        if self.cache is not None and self.block_table is not None:
            keys = self.block_table.shape[1] * self.cache.page_size
        return keys if current() is None else -(-keys // KEYS) * KEYS

    @cached_property
    def page_ids(self) -> torch.Tensor:
        """The block table padded to `keys`, as `index_select` takes it: int64 [S * pages]."""
        assert self.block_table is not None and self.cache is not None
        missing = -(-self.keys // self.cache.page_size) - self.block_table.shape[1]
        table = F.pad(self.block_table, (0, missing)) if missing else self.block_table
        return table.flatten().long()

    @cached_property
    def padding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed index of each padded query [S, max_query], and the inverse (flat)."""
        query_lengths = self.cu_seqlens.diff()
        offsets_SL = torch.arange(self.max_query, device=self.cu_seqlens.device)[None]
        inside_SL = offsets_SL < query_lengths[:, None]
        rows_SL = torch.where(inside_SL, self.cu_seqlens[:-1, None] + offsets_SL, 0).long()
        return rows_SL, inside_SL.flatten().nonzero()[:, 0]

    @cached_property
    def key_rows(self) -> torch.Tensor:
        """Packed index of each key and value [S, keys]; token 0, masked, beyond a span."""
        missing = self.keys - self.max_query
        return F.pad(self.padding[0], (0, missing)) if missing else self.padding[0]

    @cached_property
    def causal_bias(self) -> torch.Tensor:
        """fp32 [S, 1, max_query, keys]: 0 for keys up to the query's position, else -inf."""
        device = self.lengths.device
        end_SL = self.lengths.clamp(min=1)[:, None, None]  # padding rows see a key too
        if self.max_query > 1:
            first_S = (self.lengths - self.cu_seqlens.diff())[:, None, None]
            end_SL = first_S + torch.arange(1, self.max_query + 1, device=device)[None, :, None]
        seen = torch.arange(self.keys, device=device) < end_SL
        return torch.where(seen, 0.0, -torch.inf)[:, None]


def packed_context(cu_seqlens: torch.Tensor, max_seqlen: int) -> AttentionContext:
    """Context of whole sequences without a cache: training, and the oracle of generation."""
    return AttentionContext(cu_seqlens, cu_seqlens.diff(), max_seqlen, max_seqlen)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _flash(
    q_TNH: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: AttentionContext, scale: float
) -> torch.Tensor:
    """Attention on CUDA: our own kernels where supported, with the same bits for a query in
    training, prefill and decode; elsewhere torch's FlashAttention.
    """
    if q_TNH.shape[-1] not in HEAD_DIMS or not _is_hopper(q_TNH.device):
        return flash_attention_2(q_TNH, k, v, ctx, scale)
    # imported here: they need a GPU driver
    from mesh.invariant.triton_attention import varlen_attention
    from mesh.invariant.triton_flash import attention_forward

    if ctx.cache is None:
        return varlen_attention(q_TNH, k, v, ctx.cu_seqlens, ctx.max_query, scale)
    spans = (ctx.cu_seqlens, ctx.max_query)
    return attention_forward(q_TNH, k, v, *spans, scale, ctx.lengths, ctx.block_table)[0]


def flash_attention_2(
    q_TNH: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: AttentionContext, scale: float
) -> torch.Tensor:
    """torch's FlashAttention, which sums in whatever order is fastest."""
    assert current() is None, "not batch-invariant: the start-up checks missed it"
    out = varlen_attn(
        q_TNH, k, v, ctx.cu_seqlens, ctx.cu_seqlens, ctx.max_query, ctx.max_length,
        scale=scale, window_size=(-1, 0), enable_gqa=True,
        seqused_k=ctx.lengths if ctx.cache is not None else None, block_table=ctx.block_table,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


def _read_pages(pages: torch.Tensor, ctx: AttentionContext) -> torch.Tensor:
    """Keys or values of every sequence, [S, keys, K, H]; page 0, masked, beyond its own pages."""
    rows = pages.index_select(0, ctx.page_ids).view(ctx.lengths.shape[0], -1, *pages.shape[2:])
    return rows[:, : ctx.keys]


def _padded(
    q_TNH: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: AttentionContext, scale: float
) -> torch.Tensor:
    """Plain attention over queries padded to the longest span, for CPU and fp32."""
    # one token per span; empty spans, which pad a captured batch, come last
    decodes = ctx.max_query == 1 and q_TNH.shape[:1] == ctx.lengths.shape
    q_SLNH = q_TNH[:, None] if decodes else q_TNH[ctx.padding[0]]
    if ctx.cache is None:
        k_SLKH, v_SLKH = (x[ctx.key_rows] for x in (k, v))
    else:
        k_SLKH, v_SLKH = (_read_pages(pages, ctx) for pages in (k, v))
    q_SNLH, k_SKLH, v_SKLH = (x.transpose(1, 2) for x in (q_SLNH, k_SLKH, v_SLKH))
    attend = _sdpa if current() is None else attention_by_query
    out_SNLH = attend(q_SNLH, k_SKLH, v_SKLH, ctx.causal_bias.to(q_TNH.dtype), scale)
    if decodes:
        return out_SNLH[:, :, 0]
    return out_SNLH.transpose(1, 2).flatten(0, 1)[ctx.padding[1]]


def _sdpa(
    q_SNLH: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q_SNLH, k, v, attn_mask=bias, scale=scale, enable_gqa=q_SNLH.shape[1] != k.shape[1]
    )


def attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    ctx: AttentionContext,
    layer: int,
    scale: float,
) -> torch.Tensor:
    """Causal grouped-query attention of every span over its own sequence. Returns [T, N, H].

    With a cache, new keys and values are first written to `layer`'s pages, in place.
    """
    k, v = k_TKH, v_TKH
    if ctx.cache is not None and ctx.slots_T is not None:
        k, v = ctx.cache.keys[layer], ctx.cache.values[layer]
        k.flatten(0, 1).index_copy_(0, ctx.slots_T, k_TKH)
        v.flatten(0, 1).index_copy_(0, ctx.slots_T, v_TKH)
    flash = q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16)
    return (_flash if flash else _padded)(q_TNH, k, v, ctx, scale)


class PackedAttention(Module):
    """Replaces torchtitan's inner attention: calls `attention` with its layer's cache."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        layer: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer = config.layer

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: AttentionContext,
        scale: float,
        **_: Any,
    ) -> torch.Tensor:
        out = attention(q_BLNH[0], k_BLNH[0], v_BLNH[0], attention_masks, self.layer, scale)
        return out[None]
