"""Decode steps as CUDA graphs: one captured forward pass per batch-size bucket.

A decode step of a small model is hundreds of short kernels; launching them costs more than running
them. The captured pass is the same Python as the eager one on static buffers, so it has its bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mesh.model.attention import AttentionContext, KVCache
from mesh.model.qwen3 import Qwen3


def bucket_of(rows: int) -> int:
    """The batch size to pad to: powers of two up to 8, then multiples of 8 to 64, of 32 above."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor
    positions: torch.Tensor
    context: AttentionContext
    hidden: torch.Tensor


class DecodeGraphs:
    """Owns the captured graphs of one model and cache, captured at first use of a bucket."""

    def __init__(self, model: Qwen3, cache: KVCache, table_width: int) -> None:
        self.model = model
        self.cache = cache
        self.table_width = table_width
        self.captured: dict[int, _Captured] = {}
        self.pool: tuple[int, int] | None = None

    def run(
        self, tokens_S: torch.Tensor, positions_S: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Hidden states [S, D] of a decode step, as `model.hidden` gives them. Overwritten by the
        next call of the same bucket.
        """
        rows = len(tokens_S)
        bucket = bucket_of(rows)
        if bucket not in self.captured:
            self.captured[bucket] = self._capture(bucket, tokens_S.device)
        static = self.captured[bucket]
        assert context.block_table is not None and context.slots_T is not None
        static.tokens[:rows] = tokens_S
        static.positions[:rows] = positions_S
        static.context.lengths[:rows] = context.lengths
        static.context.slots_T[:rows] = context.slots_T
        static.context.block_table[:rows, : context.block_table.shape[1]] = context.block_table
        # rows beyond the batch read and write page 0 only, which belongs to nobody
        static.context.lengths[rows:] = 1
        static.context.slots_T[rows:] = 0
        static.context.block_table[rows:] = 0
        static.positions[rows:] = 0
        static.graph.replay()
        return static.hidden[:rows]

    def _capture(self, bucket: int, device: torch.device) -> _Captured:
        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        context = AttentionContext(
            cu_seqlens=torch.arange(bucket + 1, dtype=torch.int32, device=device),
            lengths=torch.ones(bucket, dtype=torch.int32, device=device),
            max_query=1,
            max_length=self.table_width * self.cache.page_size,
            cache=self.cache,
            block_table=zeros(bucket, self.table_width, dtype=torch.int32),
            slots_T=zeros(bucket, dtype=torch.int64),
        )
        tokens, positions = (zeros(bucket, dtype=torch.int64) for _ in range(2))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.model.hidden(tokens, positions, context)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self.model.hidden(tokens, positions, context)
        self.pool = self.pool or graph.pool()
        return _Captured(graph, tokens, positions, context, hidden)
