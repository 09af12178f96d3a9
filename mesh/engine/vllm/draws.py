"""Drawing the tokens of a batch: logits, keys, draw and score; on CUDA one graph.

A decode step of vLLM takes as long as the host needs to prepare it; these twenty launches were a
sixth of that. The captured calls are the eager ones on static buffers. In the batch-invariant mode
they have the bits of the eager ones, as a row does not know how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mesh.engine.choice import choose
from mesh.engine.native.graphs import bucket_of
from mesh.engine.sampler import position_keys
from mesh.types import Sampling


class Rows(NamedTuple):
    """What is drawn for: static buffers of as many rows as an engine has sequences.

    keys: `sampler.sequence_keys`; lengths: of the whole sequences, with the token that is drawn
    from, as vLLM keeps them.
    """

    keys: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor
    logprobs: torch.Tensor


class Draws:
    """Owns the captured graphs. `head`: from features [S, X], hidden states or logits, whatever the
    model gives, to logits [S, V / shards], of which each rank of `group` has a shard; None: they
    are whole.
    """

    def __init__(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        group: dist.ProcessGroup | None,
        graphs: bool,
    ) -> None:
        self.head, self.group = head, group
        self.graphs = graphs and group is None
        self.captured: dict[tuple[int, float], _Captured] = {}
        self.features: torch.Tensor | None = None
        self.pool: Any = None

    def __call__(
        self, features_SX: torch.Tensor, rows: Rows, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens_S, logprobs_S), new tensors."""
        count = len(features_SX)
        truncated = sampling.top_k > 0 or sampling.top_p < 1
        if not self.graphs or truncated:
            return self._draw(features_SX, rows, sampling)
        if self.features is None:
            self.features = features_SX.new_zeros(len(rows.keys), features_SX.shape[1])
        self.features[:count] = features_SX
        bucket = min(bucket_of(count), len(rows.keys))
        key = bucket, sampling.temperature
        if key not in self.captured:
            self.captured[key] = self._capture(self.features[:bucket], rows, sampling)
        static = self.captured[key]
        static.graph.replay()
        return static.tokens[:count].clone(), static.logprobs[:count].clone()

    def _draw(
        self, features_SX: torch.Tensor, rows: Rows, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys_S, prompt_lengths_S, lengths_S = (row[: len(features_SX)] for row in rows)
        keys_S = position_keys(keys_S, lengths_S - prompt_lengths_S)
        return choose(self.head(features_SX), keys_S, sampling, self.group)

    def _capture(self, features_SX: torch.Tensor, rows: Rows, sampling: Sampling) -> _Captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._draw(features_SX, rows, sampling)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            tokens, logprobs = self._draw(features_SX, rows, sampling)
        self.pool = self.pool or graph.pool()
        return _Captured(graph, tokens, logprobs)
