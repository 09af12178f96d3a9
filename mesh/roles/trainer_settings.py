"""What a trainer is built from: its shape, its start, and how it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mesh.roles.optimizer import OptimizerSettings
from mesh.types import Distribution, ModelShape


@dataclass(frozen=True)
class Start:
    """Source of the weights: a Hugging Face directory, or (path None) random ones of `seed`."""

    path: Path | None
    seed: int


@dataclass(frozen=True)
class ModelSource:
    """A model to build. dtype: in which its weights are kept; stored_vocab: rows of the vocabulary
    in its directory, where they are not those of `shape`: its embedding and its head are cut to the
    shape's, or padded with zeros.
    """

    shape: ModelShape
    start: Start
    dtype: torch.dtype = torch.float32
    stored_vocab: int | None = None


REFERENCE, TEACHER = "reference", "teacher"
"""Names of frozen models."""


@dataclass(frozen=True)
class TrainerSettings:
    """The trainer, resolved. dtype: of its computation, over fp32 master weights; max_length: the
    context [tokens]; temperature, top_k, top_p: of the distribution whose logprobs are taken;
    optimizer: None where nothing is trained; frozen: models that are scored beside the policy, by
    name.
    """

    shape: ModelShape
    max_length: int
    dtype: torch.dtype
    start: Start
    temperature: float
    optimizer: OptimizerSettings | None = None
    frozen: Mapping[str, ModelSource] = field(default_factory=dict)
    sequence_parallel: bool = False
    activation_checkpointing: str = "none"
    on_nonfinite: str = "stop"
    top_k: int = 0
    top_p: float = 1.0

    @property
    def distribution(self) -> Distribution:
        return Distribution(self.temperature, self.top_k, self.top_p)

    @property
    def source(self) -> ModelSource:
        """The policy's start."""
        return ModelSource(self.shape, self.start)
