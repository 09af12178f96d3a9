"""Decode steps as CUDA graphs: one captured forward pass per batch-size bucket.

A decode step of a small model is hundreds of short kernels; launching them costs more than running
them. The captured pass is the same Python as the eager one on static buffers, so it has its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mesh.engine.base import bucket_of
from mesh.engine.native.batches import TABLE, decode_inputs
from mesh.model.attention import KVCache
from mesh.model.policy import Policy


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    rows: torch.Tensor
    hidden: torch.Tensor


class DecodeGraphs:
    """Owns the captured graphs of one model and cache, captured at first use of a bucket."""

    def __init__(self, model: Policy, cache: KVCache, table_width: int) -> None:
        self.model = model
        self.cache = cache
        self.columns = TABLE + table_width
        self.captured: dict[int, _Captured] = {}
        self.pool: Any = None

    def run(self, rows_SX: torch.Tensor) -> torch.Tensor:
        """Hidden states [S, D] of a decode step. Overwritten by the next call of the same bucket.

        rows_SX: `decode_rows` on the device.
        """
        count = len(rows_SX)
        bucket = bucket_of(count)
        if bucket not in self.captured:
            self.captured[bucket] = self._capture(bucket, rows_SX.device)
        static = self.captured[bucket]
        self._fill(static.rows, rows_SX)
        static.graph.replay()
        return static.hidden[:count]

    def run_eagerly(self, rows_SX: torch.Tensor) -> torch.Tensor:
        """The result of `run` by the same shapes, and so the same kernels, launched one by one."""
        rows = rows_SX.new_zeros(bucket_of(len(rows_SX)), self.columns)
        self._fill(rows, rows_SX)
        return self.model.hidden(*decode_inputs(rows, self.cache))[: len(rows_SX)]

    def _fill(self, rows: torch.Tensor, rows_SX: torch.Tensor) -> None:
        count, width = rows_SX.shape
        rows[:count, :width] = rows_SX
        rows[count:] = 0

    def _capture(self, bucket: int, device: torch.device) -> _Captured:
        rows = torch.zeros(bucket, self.columns, dtype=torch.int64, device=device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.model.hidden(*decode_inputs(rows, self.cache))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self.model.hidden(*decode_inputs(rows, self.cache))
        self.pool = self.pool or graph.pool()
        return _Captured(graph, rows, hidden)
