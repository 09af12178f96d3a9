"""The engine contract as a type, and the nouns that all engines share; see `mesh.engine`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.distributed as dist

from mesh.model.policy import Policy
from mesh.types import Completion, ModelShape, Request, RolloutKey, Sample, Sampling

Row = tuple[int, int | None, int]
"""(prompt_id, sample_id, position) of a row of a forward pass; sample_id None: it serves all."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of one engine, in tokens and sequences.

    kv_tokens: the KV cache; prefill_tokens: the largest prefill of one forward pass; releases: the
    trainer has the cache's memory after `release`, until tokens are asked for again.
    """

    max_length: int
    max_sequences: int
    kv_tokens: int
    page_size: int
    prefill_tokens: int
    prefix_cache: bool
    cuda_graphs: bool
    releases: bool = False


@dataclass(frozen=True)
class Continuation(Sample):
    """The next turn of a kept sample: the tokens of `reply` follow those that it has, then at most
    `max_new_tokens` are sampled.
    """

    reply: tuple[int, ...]
    max_new_tokens: int


class Engine(Protocol):
    """The contract of `mesh.engine`, with the attributes that a trace reads.

    group: the engine's tp ranks, None: one; version: of the weights, negative before the first
    ones; observer: called with the rows of every forward pass before it.
    """

    shape: ModelShape
    settings: EngineSettings
    group: dist.ProcessGroup | None
    version: int
    observer: Callable[[list[Row]], None] | None

    @property
    def model(self) -> Policy: ...

    @property
    def preemptions(self) -> int: ...

    @property
    def unfinished(self) -> bool: ...

    @property
    def kept(self) -> Collection[RolloutKey]: ...

    def add(self, requests: Collection[Request], sampling: Sampling) -> None: ...

    def step(self) -> list[Completion]: ...

    def extend(self, continuations: Collection[Continuation]) -> None: ...

    def drop(self, keys: Collection[RolloutKey]) -> None: ...

    def generate(self, requests: Collection[Request], sampling: Sampling) -> list[Completion]: ...

    def weights(self) -> dict[str, torch.Tensor]: ...

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None: ...

    def reset(self, version: int) -> None: ...

    def release(self) -> None: ...

    def with_settings(self, settings: EngineSettings) -> Self: ...

    def close(self) -> None: ...


def num_pages(tokens: int, page_size: int) -> int:
    """Pages that `tokens` tokens fill, the last one perhaps in part."""
    return -(-tokens // page_size)


def bucket_of(rows: int) -> int:
    """Batch size to pad to: powers of two up to 8, then multiples of 8 to 64, of 32 above."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step
