"""The optimizer over the trainer's shards: AdamW or the user's own, its schedule, and its state."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mesh.layout.reshard import ParamLayout
from mesh.roles.averaging import AveragedWeights
from mesh.roles.own_optimizer import build_optimizer
from mesh.roles.own_state import OWN, fill_numbers, prepare, state_layouts, state_of

Decay = Literal["none", "linear", "cosine"]
DecayedWeights = Literal["all", "matrices"]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101). lr: the peak; clip_norm: bound of the gradient's norm, 0: none;
    decay: from the peak to lr_floor, a share of it, at the end of `steps`; weight_decay_on: the
    weights that decay; fused: AdamW's one kernel an update; ema: decay of the averaged weights, 0:
    there are none; name and args: an optimizer of the user's in AdamW's place.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int
    clip_norm: float
    decay: Decay = "none"
    steps: int = 0
    lr_floor: float = 0.0
    weight_decay_on: DecayedWeights = "all"
    fused: bool = False
    ema: float = 0.0
    name: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of state that an update needs beside the weights, each in their shape and dtype."""

EMA = "ema"
"""Kind of state that the averaged weights are."""

EMBEDDINGS = "tok_embeddings.weight"  # also the name of a tied weight


def lr_at(step: int, settings: OptimizerSettings) -> float:
    """Learning rate of the updates that follow `step` steps: linear warm-up to the peak, then
    constant or decaying to the floor.

    The first of `warmup_steps` gets peak / warmup_steps. The first step of the decay gets the peak,
    and the step after its last one would get the floor, as all that follow do.
    """
    warmup, peak = settings.warmup_steps, settings.lr
    if step < warmup or settings.decay == "none":
        return peak * min(1.0, (step + 1) / max(warmup, 1))
    left = max(settings.steps - step, 0) / max(settings.steps - warmup, 1)
    if settings.decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return peak * (settings.lr_floor + (1 - settings.lr_floor) * left)


def decays(name: str, weight: Tensor, on: DecayedWeights) -> bool:
    """True if weight decay shrinks this weight: with `matrices` neither norms nor biases nor the
    embeddings, which a tied model's head shares."""
    return on == "all" or (weight.dim() > 1 and name != EMBEDDINGS)


def state_kinds(settings: OptimizerSettings) -> tuple[str, ...]:
    """Kinds of state that `Optimizer.state` has, in order."""
    return (*(MOMENTS if settings.name is None else [OWN]), *([EMA] if settings.ema else []))


def groups_of(weights: Mapping[str, Tensor], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """The weights, with their names, as groups of torch's optimizers, each with its weight decay;
    none is empty."""
    groups = []
    for decayed in (True, False):
        mine = {
            n: w for n, w in weights.items() if decays(n, w, settings.weight_decay_on) == decayed
        }
        decay = settings.weight_decay if decayed else 0.0
        groups += [{"params": list(mine.items()), "weight_decay": decay}] if mine else []
    return groups


def made(weights: Mapping[str, Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """torch's optimizer over these weights, without state."""
    groups = groups_of(weights, settings)
    if settings.name is not None:
        return build_optimizer(settings.name, settings.args, groups, settings.lr)
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=settings.fused or None,
    )


class Optimizer:
    """Owns the optimizer's state for these weights, by torchtitan's names, and their average.
    Counts the updates that were made.
    """

    def __init__(self, weights: Mapping[str, Tensor], settings: OptimizerSettings) -> None:
        self.settings, self.weights = settings, weights
        self.averaged = AveragedWeights(weights, settings.ema) if settings.ema else None
        self.updates = 0
        self._moving = threading.Lock()
        self._whole = True
        self.inner = made(weights, settings)

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows `step` steps."""
        return lr_at(step, self.settings)

    def step(self, gradients: Mapping[str, Tensor], norm: float, lr: float) -> None:
        """Clip the gradients (the local shards of the parameters' own) to the bound, and update.

        norm: of the whole gradient, the same on all ranks. Where it is 0 there is nothing to learn
        from, and weights, moments, average and AdamW's count of updates stay: its moments would go
        on moving the weights, and weight decay shrink them.
        """
        if norm == 0:
            return
        if 0 < self.settings.clip_norm < norm:
            torch._foreach_mul_(list(gradients.values()), self.settings.clip_norm / norm)
        for group in self.inner.param_groups:
            group["lr"] = lr
        with self._moving:
            self._whole = False
            self.inner.step()
            if self.averaged is not None:
                self.averaged.move()
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
        self.inner.zero_grad(set_to_none=True)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state under AdamW, `MOMENTS` and `step`: zeros before its first update."""
        state = self.inner.state[parameter]
        if not state:  # as AdamW makes it in its first step
            device = parameter.device if self.settings.fused else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state |= {kind: torch.zeros_like(parameter) for kind in MOMENTS}
        return state

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors beside the weights that the next update depends on, by kind and name: those
        of a user's optimizer, which has none before its first update, by `KEY/WEIGHT`."""
        if self.settings.name is not None:
            found = {OWN: state_of(self.inner, self.weights).tensors if self.updates else {}}
        else:
            moments = {name: self.moments(weight) for name, weight in self.weights.items()}
            found = {kind: {name: m[kind] for name, m in moments.items()} for kind in MOMENTS}
        return found | ({EMA: self.averaged.tensors} if self.averaged is not None else {})

    def numbers(self) -> dict[str, Any]:
        """The plain values that a user's next update depends on."""
        own = self.settings.name is not None and self.updates > 0
        return state_of(self.inner, self.weights).numbers if own else {}

    def own_layouts(
        self, layouts: Mapping[str, ParamLayout], ranks: Sequence[int]
    ) -> list[ParamLayout]:
        """The layouts of a user's state on the trainer's ranks, from those of the weights."""
        found, problems = state_layouts(self.state().get(OWN, {}), self.weights, layouts, ranks)
        assert not problems, "; ".join(problems)
        return found

    def own_problems(self, layouts: Mapping[str, ParamLayout], ranks: Sequence[int]) -> list[str]:
        """What keeps a user's optimizer from running on this mesh, and its state from being saved:
        tried on one that is thrown away. Collective, as its step is; weights keep their bits."""
        if self.settings.name is None:
            return []
        try:
            probe = made(self.weights, self.settings)
            prepare(probe, self.weights)
        except ValueError as error:
            return [str(error)]
        state = state_of(probe, self.weights)
        return state.problems + state_layouts(state.tensors, self.weights, layouts, ranks)[1]

    def make_state(self, updates: int, numbers: Mapping[str, Any]) -> None:
        """Have the state of so many updates, with these plain values, into whose tensors theirs are
        to be loaded."""
        if self.settings.name is not None and updates:
            prepare(self.inner, self.weights)
            fill_numbers(self.inner, self.weights, numbers)
            self.updates = updates

    def continue_after(self, updates: int) -> None:
        """Resume after so many updates, whose state is already loaded."""
        self.updates = updates
        if self.settings.name is None:
            for weight in self.weights.values():
                self.moments(weight)["step"].fill_(updates)

    def restart(self) -> None:
        """Forget all updates; the average begins again at the weights."""
        self.inner = made(self.weights, self.settings)
        if self.averaged is not None:
            self.averaged.restart()
        self.updates = 0
