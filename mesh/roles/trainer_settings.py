"""What a trainer is built from: its shape, its start, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mesh.roles.optimizer import OptimizerSettings
from mesh.types import ModelShape


@dataclass(frozen=True)
class Start:
    """Source of the weights: a Hugging Face directory, or (path None) random ones of `seed`."""

    path: Path | None
    seed: int


@dataclass(frozen=True)
class TrainerSettings:
    """The trainer, resolved. dtype: of its computation, over fp32 master weights; max_length: the
    context [tokens]; temperature: at which logprobs are taken; optimizer: None where nothing is
    trained; reference: whether a frozen copy of the start is kept.
    """

    shape: ModelShape
    max_length: int
    dtype: torch.dtype
    start: Start
    temperature: float
    optimizer: OptimizerSettings | None = None
    reference: bool = False
    sequence_parallel: bool = False
    activation_checkpointing: str = "none"
    on_nonfinite: str = "stop"
