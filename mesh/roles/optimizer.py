"""The optimizer: AdamW over the trainer's shards, its schedule, and the state that resumes it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Decay = Literal["none", "linear", "cosine"]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101). lr: the peak; clip_norm: bound of the gradient's norm, 0: none;
    decay: from the peak to 0 over the rest of `steps`.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int
    clip_norm: float
    decay: Decay = "none"
    steps: int = 0


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of state that an update needs beside the weights, each in their shape and dtype."""


def lr_at(step: int, settings: OptimizerSettings) -> float:
    """Linear warm-up to the peak, then constant or decaying. The first of `warmup_steps` gets
    peak / warmup_steps, and the step after the last would get 0.
    """
    warmup = settings.warmup_steps
    if step < warmup or settings.decay == "none":
        return settings.lr * min(1.0, (step + 1) / max(warmup, 1))
    left = max(settings.steps - step, 0) / max(settings.steps - warmup, 1)
    if settings.decay == "linear":
        return settings.lr * left
    return settings.lr * (1 - math.cos(math.pi * left)) / 2


class Optimizer:
    """Owns the moments of these parameters. Counts the updates that were made."""

    def __init__(self, parameters: Iterable[Tensor], settings: OptimizerSettings) -> None:
        self.settings = settings
        self.updates = 0
        self._moving = threading.Lock()
        self._whole = True
        self.adamw = torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows `step` steps."""
        return lr_at(step, self.settings)

    def step(self, gradients: Mapping[str, Tensor], norm: float, lr: float) -> None:
        """Clip the gradients (the local shards of the parameters' own) to the bound, and update.

        norm: of the whole gradient, the same on all ranks. Where it is 0 there is nothing to learn
        from, and weights, moments and AdamW's count of updates stay: its moments would go on
        moving the weights, and weight decay shrink them.
        """
        if norm == 0:
            return
        if 0 < self.settings.clip_norm < norm:
            torch._foreach_mul_(list(gradients.values()), self.settings.clip_norm / norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        with self._moving:
            self._whole = False
            self.adamw.step()
            self.updates += 1
            self._whole = True

    def hold(self, seconds: float) -> int | None:
        """Forbid all updates from now on, for another thread that reads weights and moments; the
        number of updates that they hold. None where one does not end within so many seconds, or
        failed half-way."""
        held = self._moving.acquire(timeout=seconds)
        return self.updates if held and self._whole else None

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state, `MOMENTS` and `step`: zeros before its first update."""
        state = self.adamw.state[parameter]
        if not state:  # as AdamW makes it in its first step
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {kind: torch.zeros_like(parameter) for kind in MOMENTS}
        return state

    def continue_after(self, updates: int, parameters: Iterable[Tensor]) -> None:
        """Resume after so many updates, whose moments are already loaded."""
        self.updates = updates
        for parameter in parameters:
            self.moments(parameter)["step"].fill_(updates)

    def restart(self) -> None:
        """Forget all updates."""
        self.adamw.state.clear()
        self.updates = 0
