"""The objective of a run: its loss with every setting filled in, as the trainer minimises it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mesh.config.spelling import nearest
from mesh.config.user_code import call_user_code, import_named
from mesh.rl.advantages import Advantage, group_advantages
from mesh.rl.aggregation import Aggregation, normaliser, token_weights
from mesh.rl.losses import LOSSES, Loss, LossTokens, Need, kl_T

BOUNDS = ("clip_low", "clip_high")
"""Settings that are keys of the run; a surrogate's other settings are keys of `loss_args`."""

PROVIDED: frozenset[Need] = frozenset({"reference_logprobs", "sequence_ratio", "step_statistics"})
"""Needs of a loss that the trainer can meet."""


class Terms(NamedTuple):
    """Per loss token: the loss to minimise, bool clipped, and the KL to the reference (None: the
    reference was not scored)."""

    loss_T: Tensor
    clipped_T: Tensor
    kl_T: Tensor | None


@dataclass(frozen=True)
class Objective:
    """A loss and its settings. longest_response: divisor of `constant` aggregation [tokens]."""

    loss: Loss
    settings: Mapping[str, Any] = field(default_factory=dict)
    kl_coef: float = 0.0
    longest_response: int = 1

    @property
    def needs(self) -> frozenset[Need]:
        """Needs of the loss, and the reference where its KL is weighted."""
        return self.loss.needs | ({"reference_logprobs"} if self.kl_coef > 0 else set())

    def __call__(self, tokens: LossTokens) -> Terms:
        """Loss of every token; the gradient goes through `tokens.logprobs_T`."""
        if self.loss.credit is not None:
            with torch.no_grad():
                tokens = replace(tokens, advantages_T=self.loss.credit(tokens))
        loss_T, clipped_T = self.loss.surrogate(tokens, **self.settings)
        check_shapes(loss_T, clipped_T, tokens)
        if tokens.reference_logprobs_T is None:
            assert self.kl_coef == 0, "the reference was not scored"
            return Terms(loss_T, clipped_T, None)
        divergence_T = kl_T(tokens.logprobs_T, tokens.reference_logprobs_T)
        if self.kl_coef > 0:
            loss_T = loss_T + self.kl_coef * divergence_T
        return Terms(loss_T, clipped_T, divergence_T)

    def advantages(self, rewards_PG: Tensor) -> Tensor:
        """float32 advantages_PG on the CPU."""
        if isinstance(self.loss.advantage, str):
            return group_advantages(rewards_PG, self.loss.advantage)
        return self.loss.advantage(rewards_PG)

    def weights(self, lengths_R: Tensor) -> Tensor:
        """float32 weights_R of each rollout's tokens, from loss tokens a rollout."""
        return token_weights(lengths_R, self.loss.aggregation)

    def normaliser(self, num_tokens: int, num_sequences: int) -> float:
        """Divisor of the step's sum of losses, from the counts of all ranks and waves."""
        return normaliser(num_tokens, num_sequences, self.loss.aggregation, self.longest_response)


def check_shapes(loss_T: Tensor, clipped_T: Tensor, tokens: LossTokens) -> None:
    """Raise ValueError for a surrogate that does not give one loss and one bool per token: a mean
    would be broadcast over the tokens' weights, and train on something else unnoticed.
    """
    wanted = tokens.logprobs_T.shape
    if loss_T.shape != wanted or clipped_T.shape != wanted or clipped_T.dtype != torch.bool:
        raise ValueError(
            f"the loss gave loss_T of shape {tuple(loss_T.shape)} and clipped_T of shape "
            f"{tuple(clipped_T.shape)} and {clipped_T.dtype} for {wanted[0]} tokens; return one "
            "loss and one bool per token"
        )


def trial(objective: Objective) -> None:
    """Run an objective on four made-up tokens, and its advantages on two groups of two.

    Raises ValueError where user code raises, or gives shapes that cannot be trained on.
    """
    logprobs_T = torch.full((4,), -1.0, requires_grad=True)
    tokens = LossTokens(
        logprobs_T, torch.full((4,), -1.1), torch.tensor([1.0, 1.0, -1.0, -1.0]),
        torch.tensor([0, 0, 1, 1]), reference_logprobs_T=torch.full((4,), -1.2),
    )  # fmt: skip
    call_user_code("its surrogate", lambda: objective(tokens))
    rewards_PG = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    advantages_PG = call_user_code("its advantage", lambda: objective.advantages(rewards_PG))
    if advantages_PG.shape != rewards_PG.shape:
        shapes = f"{tuple(advantages_PG.shape)} for rewards of {tuple(rewards_PG.shape)}"
        raise ValueError(f"its advantage gave shape {shapes}; return one advantage per reward")


def objective_of(
    loss: Loss,
    *,
    advantage: Advantage | None = None,
    aggregation: Aggregation | None = None,
    settings: Mapping[str, Any] | None = None,
    kl_coef: float = 0.0,
    longest_response: int = 1,
) -> Objective:
    """The objective of a loss; what is None is the loss's own."""
    loss = replace(
        loss,
        advantage=advantage or loss.advantage,
        aggregation=aggregation or loss.aggregation,
    )
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    return Objective(loss, {**loss.settings, **given}, kl_coef, longest_response)


def load_loss(name: str) -> Loss:
    """The loss that `loss=name` asks for: a row of LOSSES, or MODULE:NAME. ValueError otherwise."""
    if ":" not in name:
        if name in LOSSES:
            return LOSSES[name]
        near = nearest(name, LOSSES)
        hint = f"did you mean {near}? " if near else ""
        remedy = f"use one of {', '.join(LOSSES)}, or MODULE:NAME for a loss of your own"
        raise ValueError(f"loss={name}: no such loss; {hint}{remedy}")
    module, attribute = import_named("loss", name, "my_losses:UNCLIPPED")
    loss = getattr(module, attribute, None)
    if not isinstance(loss, Loss):
        found = [key for key, value in vars(module).items() if isinstance(value, Loss)]
        has = f"it has {', '.join(found)}" if found else "it has none"
        raise ValueError(
            f"loss={name}: {attribute} is no mesh.rl.losses.Loss of {module.__name__}; {has}"
        )
    return loss


def settings_of(loss: Loss) -> dict[str, inspect.Parameter]:
    """The settings of a loss's surrogate: its keyword-only parameters, by name."""
    parameters = inspect.signature(loss.surrogate).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def loss_problems(
    name: str, loss: Loss, bounds: Mapping[str, Any], args: Mapping[str, Any], waves: int
) -> list[str]:
    """Settings that the loss does not have or whose type is wrong, and needs that cannot be met."""
    settings, found = settings_of(loss), []
    given = {key for key, value in {**bounds, **args}.items() if value is not None}
    for key in (key for key in bounds if key in given and key not in settings):
        found.append(f"{key}={bounds[key]}: loss={name} has no such bound; leave it out")
    for key, value in args.items():
        found += _arg_problems(name, key, value, settings)
    for key, setting in settings.items():
        if setting.default is setting.empty and key not in {*given, *loss.settings}:
            where = key if key in BOUNDS else f"loss_args.{key}"
            found.append(f"{where} is missing: loss={name} needs it; write {where}=VALUE")
    unmet = sorted(loss.needs - PROVIDED)
    if unmet:
        found.append(
            f"loss={name}: needs {', '.join(unmet)}, which this trainer does not compute; use a "
            f"loss whose needs are among {', '.join(sorted(PROVIDED))}"
        )
    if "step_statistics" in loss.needs and waves > 1:
        found.append(
            f"waves={waves}: loss={name} needs the rewards of the whole step before the first "
            "backward pass; set waves=1"
        )
    return found


def _arg_problems(
    name: str, key: str, value: Any, settings: Mapping[str, inspect.Parameter]
) -> list[str]:
    own = [setting for setting in settings if setting not in BOUNDS]
    if key in BOUNDS:
        return [f"loss_args.{key}={value!r}: this is a key of the run; write {key}={value}"]
    if key not in settings:
        choice = f"it takes {', '.join(own)}" if own else "it takes none"
        return [f"loss_args.{key}={value!r}: loss={name} has no such setting; {choice}"]
    default = settings[key].default
    if default is inspect.Parameter.empty or _same_kind(value, default):
        return []
    wanted = type(default).__name__
    return [f"loss_args.{key}={value!r}: this is {type(value).__name__}; give {wanted}"]


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, float) and not isinstance(value, bool):
        return isinstance(value, int | float)
    return default is None or type(value) is type(default)
