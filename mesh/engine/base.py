"""What an engine is, for those who do not mind which one they have; see `mesh.engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.distributed as dist

from mesh.engine.native.batches import Row
from mesh.model.policy import Policy
from mesh.types import Completion, ModelShape, Request, Sampling


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of one engine. kv_tokens: the cache; prefill_tokens: the most of a forward pass;
    releases: the cache's memory is the trainer's between calls of `generate`.
    """

    max_length: int
    max_sequences: int
    kv_tokens: int
    page_size: int
    prefill_tokens: int
    prefix_cache: bool
    cuda_graphs: bool
    releases: bool = False


class Engine(Protocol):
    """The verbs of `mesh.engine`, and what a trace looks at.

    model: the policy, whose modules are ours; group: its tp ranks, None: one; version: of the
    weights; preemptions: sequences that made room, so far. `observer`, where there is one, is told
    the rows of every forward pass before it.
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

    def add(self, requests: Seq[Request], sampling: Sampling) -> None: ...

    def step(self) -> list[Completion]: ...

    def generate(self, requests: Seq[Request], sampling: Sampling) -> list[Completion]: ...

    def weights(self) -> dict[str, torch.Tensor]: ...

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None: ...

    def reset(self, version: int) -> None: ...

    def release(self) -> None: ...

    def with_settings(self, settings: EngineSettings) -> Self: ...

    def close(self) -> None: ...
