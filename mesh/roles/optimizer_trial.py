"""Start-up trial of a user's optimizer: updates of made-up weights, and a resume between them.

What a checkpoint cannot hold shows here, before a model is built: the run that goes on from saved
tensors and plain values has to take the same steps as the one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mesh.config.user_code import call_user_code
from mesh.roles.optimizer import EMBEDDINGS, OptimizerSettings, made
from mesh.roles.own_optimizer import KEY
from mesh.roles.own_state import OwnState, fill_numbers, prepare, state_of

SHAPES = {EMBEDDINGS: (9, 6), "layers.0.attention.wo.weight": (6, 6), "norm.weight": (6,)}
STEPS, RESUMED = 4, 2
Weights = dict[str, Tensor]


def trial(settings: OptimizerSettings) -> None:
    """Raises ValueError where the optimizer cannot be built, raises, has state that cannot be
    saved, moves no weight, or does not go on from its saved state."""
    what = f"{KEY}={settings.name}"
    weights = made_up(0, -1)
    start, optimizer = copied(weights), made(weights, settings)
    steps_of(optimizer, weights, settings, range(1))
    first = saved(optimizer, weights, what)
    steps_of(optimizer, weights, settings, range(1, RESUMED))
    middle, state = copied(weights), saved(optimizer, weights, what)
    if keys_of(state) != keys_of(first):
        one = min(keys_of(state) ^ keys_of(first))
        wrong = f"its state {one} is not there after every step"
        raise ValueError(f"{what}: {wrong}; make all of it in the first step")
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    steps_of(optimizer, weights, settings, range(RESUMED, STEPS))
    if same(weights, start):
        raise ValueError(f"{what}: it moved no weight in {STEPS} steps; update them in step()")

    other = {name: weight.requires_grad_() for name, weight in middle.items()}
    resumed = made(other, settings)
    prepare(resumed, other)
    for name, tensor in state_of(resumed, other).tensors.items():
        tensor.copy_(tensors[name])
    fill_numbers(resumed, other, state.numbers)
    steps_of(resumed, other, settings, range(RESUMED, STEPS))
    if not same(weights, other):
        raise ValueError(
            f"{what}: resumed from its saved state it takes other steps than without the "
            "interruption; keep all that a step depends on in self.state[weight] (tensors and "
            "numbers) or in the groups (numbers), and draw no random numbers"
        )


def made_up(seed: int, scale: int) -> Weights:
    """Tensors of all shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 10**scale).requires_grad_()
        for name, shape in SHAPES.items()
    }


def steps_of(
    optimizer: torch.optim.Optimizer, weights: Weights, settings: OptimizerSettings, steps: Iterable
) -> None:
    """Take these steps, each with gradients of its own."""
    for step in steps:
        gradients = made_up(step + 1, -2)
        for name, weight in weights.items():
            weight.grad = gradients[name].detach()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr / (step + 1)
        call_user_code(f"{KEY}={settings.name}: its step()", optimizer.step)


def saved(optimizer: torch.optim.Optimizer, weights: Weights, what: str) -> OwnState:
    """The state; ValueError where no checkpoint can hold it."""
    state = state_of(optimizer, weights)
    if state.problems:
        wrong = "; ".join(state.problems[:3])
        raise ValueError(f"{what}: {wrong}; keep tensors and numbers in self.state[weight]")
    return state


def keys_of(state: OwnState) -> set[str]:
    plain = {f"{key}/{n}" for n, values in state.numbers["weights"].items() for key in values}
    return {*state.tensors, *plain}


def copied(weights: Mapping[str, Tensor]) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Equal bits, but for a NaN's."""
    pairs = ((weight.detach(), theirs[name].detach()) for name, weight in mine.items())
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
