"""Drawing the tokens of a batch: logits, keys, draw and score; on CUDA one graph.

Decode steps of vLLM are host-bound, and these twenty launches were a sixth of a step. The captured
calls are the eager ones on static buffers. In the batch-invariant mode they have the bits of the
eager ones, because a row's bits do not depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mesh.engine.base import bucket_of
from mesh.engine.choice import choose
from mesh.engine.sampler import position_keys
from mesh.engine.vllm.titan import TitanModel
from mesh.types import IdSpans, Sampling


class DrawBuffers(NamedTuple):
    """Static buffers with a row for each sequence that an engine can run.

    keys: `sampler.sequence_keys`; lengths: of the sequences up to the token that predicts the drawn
    one, as vLLM keeps them.
    """

    keys: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor
    logprobs: torch.Tensor


class Draws:
    """Owns the captured graphs.

    head: from the model's output [S, X], hidden states or logits, to logits [S, V / shards], with a
    shard on each rank of `group`; group None: the logits are whole. Ids of `textless` are never
    drawn.
    """

    def __init__(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        group: dist.ProcessGroup | None,
        graphs: bool,
        textless: IdSpans,
    ) -> None:
        self.head, self.group, self.textless = head, group, textless
        self.graphs = graphs and group is None
        self.captured: dict[tuple[int, float], _Captured] = {}
        self.features: torch.Tensor | None = None
        self.pool: Any = None

    def __call__(
        self, features_SX: torch.Tensor, rows: DrawBuffers, sampling: Sampling
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
        self, features_SX: torch.Tensor, rows: DrawBuffers, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys_S, prompt_lengths_S, lengths_S = (row[: len(features_SX)] for row in rows)
        keys_S = position_keys(keys_S, lengths_S - prompt_lengths_S)
        return choose(self.head(features_SX), keys_S, sampling, self.group, self.textless)

    def _capture(
        self, features_SX: torch.Tensor, rows: DrawBuffers, sampling: Sampling
    ) -> _Captured:
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


def draws_of(model: Any, group: dist.ProcessGroup, graphs: bool, textless: IdSpans) -> Draws:
    """Draws from the output of `model`, whose product with the head they take over if they can."""
    if isinstance(model, TitanModel):
        return Draws(model.head, group if group.size() > 1 else None, graphs, textless)
    if group.size() > 1:  # it gathers the logits, which cannot be captured
        return Draws(_identity, None, graphs, textless)
    draws = Draws(model.compute_logits, None, graphs, textless)
    model.compute_logits = _identity
    return draws


def _identity(features_SX: torch.Tensor) -> torch.Tensor:
    return features_SX
