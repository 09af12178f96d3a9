"""The objective of a run: its loss with every setting filled in, as the trainer minimises it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mesh.rl.advantages import OF_STEP, Advantage, group_advantages, made_equal, rounded
from mesh.rl.aggregation import Aggregation, normaliser, token_weights
from mesh.rl.losses import (
    DIVERGENCES,
    Divergence,
    Importance,
    Loss,
    LossTokens,
    Need,
    TeacherKL,
    kl_T,
    log_ratio_T,
    taught_advantages,
)
from mesh.rl.rewards import LengthPenalty


class Terms(NamedTuple):
    """Per loss token: the loss to minimise, bool clipped, and what else is measured of it: by the
    name of the metric, which is the mean over the step's loss tokens.
    """

    loss_T: Tensor
    clipped_T: Tensor
    measured: Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss and its settings. longest_response: divisor of `constant` aggregation [tokens];
    advantage_eps: of advantages that are divided; kl_estimator: of the KL that kl_coef weighs, in
    the loss of tokens or, summed, in the reward of rollouts; length_penalty, importance: None,
    there is none; entropy_coef: weight of the entropy bonus; teacher_coef: weight of the KL to the
    teacher, which is a part of the advantages, or (teacher_kl `full`) a term with a gradient of its
    own.
    """

    loss: Loss
    settings: Mapping[str, Any] = field(default_factory=dict)
    kl_coef: float = 0.0
    longest_response: int = 1
    advantage_eps: float = 1e-6
    kl_estimator: Divergence = "k3"
    entropy_coef: float = 0.0
    teacher_coef: float = 0.0
    teacher_kl: TeacherKL = "sampled"
    kl_in: Literal["loss", "reward"] = "loss"
    length_penalty: LengthPenalty | None = None
    importance: Importance | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """Needs of the loss, and those of its terms."""
        needs: set[Need] = set(self.loss.needs)
        if self.kl_coef > 0:
            needs.add("reference_logprobs")
        if self.entropy_coef > 0:
            needs.add("entropy_gradient")
        if self.teacher_coef > 0:
            needs.add("teacher_logprobs" if self.teacher_kl == "sampled" else "teacher_kl")
        if self.importance is not None:
            needs.add("trainer_logprobs")
            needs |= {"sequence_ratio"} if self.importance.level == "sequence" else set()
        if isinstance(self.loss.advantage, str) and self.loss.advantage in OF_STEP:
            needs.add("step_statistics")
        return frozenset(needs)

    @property
    def credits_tokens(self) -> bool:
        """True if tokens have advantages of their own, and not those of their rollouts."""
        return self.loss.credit is not None or (
            self.teacher_coef > 0 and self.teacher_kl == "sampled"
        )

    def __call__(self, tokens: LossTokens) -> Terms:
        """Loss of every token; the gradient goes through `tokens.logprobs_T`."""
        return self.terms(self.credited(tokens))

    def terms(self, tokens: LossTokens) -> Terms:
        """Loss of every token that has been credited."""
        loss_T, clipped_T = self.loss.surrogate(tokens, **self.settings)
        check_shapes(loss_T, clipped_T, tokens)
        measured: dict[str, Tensor] = {}
        if self.importance is not None:
            weights_T, bounded_T = importance_of(self.importance, tokens)
            loss_T = loss_T * weights_T
            measured |= {"importance/weight": weights_T, "importance/bounded": bounded_T}
        if self.kl_coef > 0 and self.kl_in == "loss":
            assert tokens.reference_logprobs_T is not None, "the reference was not scored"
            penalty = DIVERGENCES[self.kl_estimator]
            penalty_T = penalty(tokens.logprobs_T, tokens.reference_logprobs_T)
            loss_T = loss_T + self.kl_coef * penalty_T
        if tokens.reference_logprobs_T is not None:
            measured["kl"] = kl_T(tokens.logprobs_T.detach(), tokens.reference_logprobs_T)
        if self.entropy_coef > 0:
            assert tokens.entropy_T is not None, "the entropy has no gradient"
            loss_T = loss_T - self.entropy_coef * tokens.entropy_T
        if self.teacher_coef > 0 and self.teacher_kl == "full":
            assert tokens.teacher_kl_T is not None, "the teacher was not scored"
            loss_T = loss_T + self.teacher_coef * tokens.teacher_kl_T
        if tokens.teacher_kl_T is not None:
            measured["teacher_kl"] = tokens.teacher_kl_T.detach()
        elif tokens.teacher_logprobs_T is not None:
            measured["teacher_kl"] = log_ratio_T(tokens)
        return Terms(loss_T, clipped_T, measured)

    @torch.no_grad()
    def credited(self, tokens: LossTokens) -> LossTokens:
        """The tokens with their own advantages, of the loss's `credit` and of the teacher."""
        if self.loss.credit is not None:
            tokens = replace(tokens, advantages_T=self.loss.credit(tokens))
        if self.teacher_coef > 0 and self.teacher_kl == "sampled":
            tokens = replace(tokens, advantages_T=taught_advantages(tokens, self.teacher_coef))
        return tokens

    def advantages(self, rewards_PG: Tensor, lengths_PG: Tensor | None = None) -> Tensor:
        """float64 rewards_PG -> float32 advantages_PG on the CPU. A user's function gets the
        equal rewards of a group (`equal_groups`) as one number. lengths_PG: loss tokens of each
        rollout, for the kinds that are whitened over tokens; unset: as many of each."""
        if isinstance(self.loss.advantage, str):
            kind, eps = self.loss.advantage, self.advantage_eps
            return group_advantages(rewards_PG, kind, eps, lengths_PG)
        return rounded(self.loss.advantage(made_equal(rewards_PG)), rewards_PG)

    def weights(self, lengths_R: Tensor) -> Tensor:
        """float32 weights_R of each rollout's tokens, from loss tokens a rollout."""
        return token_weights(lengths_R, self.loss.aggregation)

    def normaliser(self, num_tokens: int, num_sequences: int) -> float:
        """Divisor of the step's sum of losses, from the counts of all ranks and waves."""
        return normaliser(num_tokens, num_sequences, self.loss.aggregation, self.longest_response)


def importance_of(importance: Importance, tokens: LossTokens) -> tuple[Tensor, Tensor]:
    """(weights_T, bounded_T) of tokens whose old logprobs are the trainer's."""
    assert tokens.generator_logprobs_T is not None, "the generator's logprobs are not there"
    return importance.weights(tokens.old_logprobs_T, tokens.generator_logprobs_T, tokens.sequence_T)


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


def objective_of(
    loss: Loss,
    *,
    advantage: Advantage | None = None,
    aggregation: Aggregation | None = None,
    settings: Mapping[str, Any] | None = None,
    teacher_coef: float | None = None,
    **terms: Any,
) -> Objective:
    """The objective of a loss; what is None is the loss's own. terms: fields of `Objective`."""
    loss = replace(
        loss,
        advantage=advantage or loss.advantage,
        aggregation=aggregation or loss.aggregation,
    )
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    coef = loss.teacher_coef if teacher_coef is None else teacher_coef
    return Objective(loss, {**loss.settings, **given}, teacher_coef=coef, **terms)
