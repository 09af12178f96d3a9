"""Losses: from the logprobs, advantages and old logprobs of tokens to a loss for each of them.

A `Loss` is one noun: how rewards become advantages, a token's surrogate, how tokens are averaged,
and what else it needs. `LOSSES` lists the ones that ship. A new loss is a function of `LossTokens`,
a row, and a test. T counts the loss tokens of whole sequences; it may be 0.

Nothing here divides by a count: see `aggregation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mesh.rl.advantages import Advantage
from mesh.rl.aggregation import Aggregation

Need = Literal[
    "old_logprobs",
    "reference_logprobs",
    "teacher_logprobs",
    "sequence_ratio",
    "entropy_gradient",
    "step_statistics",
]
"""Inputs of a loss beyond its own tokens: the trainer's logprobs before the step's first update, in
place of the generator's in the ratio; logprobs of another model, scored before the advantages; all
tokens of a sequence in one call; an entropy that can be differentiated; all groups of the step in
one call of `advantage`."""


@dataclass(frozen=True)
class LossTokens:
    """T loss tokens, sequence by sequence; the gradient goes through `logprobs_T`.

    old_logprobs_T: of the policy that drew the tokens, against which the ratio is taken: the
    generator's own, or with `old_logprobs` among the needs, and wherever a step has several
    updates, the trainer's before the first of them; advantages_T: one per token;
    sequence_T: int64, the sequence that each token belongs to, ascending; generator_logprobs_T: as
    the tokens were sampled. None unless they are needed: entropy_T, of each token's distribution,
    reference_logprobs_T, of the frozen starting model, and teacher_logprobs_T.
    """

    logprobs_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor
    sequence_T: Tensor
    generator_logprobs_T: Tensor | None = None
    entropy_T: Tensor | None = None
    reference_logprobs_T: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None

    @property
    def ratio_T(self) -> Tensor:
        """Probability ratio of the policy to the old one; equal bits in both give exactly 1."""
        return torch.exp(self.logprobs_T - self.old_logprobs_T.detach())


class TokenLoss(NamedTuple):
    """loss_T, and bool clipped_T: tokens whose loss is constant because their ratio was clipped."""

    loss_T: Tensor
    clipped_T: Tensor


Surrogate = Callable[..., TokenLoss]
"""(tokens: LossTokens, *, ...settings) -> TokenLoss. Keyword-only parameters are its settings:
`clip_low` and `clip_high` are keys of the run, all others keys of `loss_args`."""


@dataclass(frozen=True)
class Loss:
    """One way to learn from scored rollouts.

    advantage: a named kind, or a function float64 rewards_PG -> advantages_PG. credit: advantages
    of single tokens, from tokens that have their rollout's; unset: these stay. settings: values of
    the surrogate's keyword parameters, where they differ from the function's own defaults.
    """

    surrogate: Surrogate
    advantage: Advantage | Callable[[Tensor], Tensor] = "std"
    aggregation: Aggregation = "token"
    needs: frozenset[Need] = frozenset()
    credit: Callable[[LossTokens], Tensor] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """ValueError for an advantage or aggregation that does not exist."""
        if isinstance(self.advantage, str) and self.advantage not in get_args(Advantage):
            choices = ", ".join(get_args(Advantage))
            raise ValueError(f"advantage={self.advantage!r}: give a function, or one of {choices}")
        if self.aggregation not in get_args(Aggregation):
            choices = ", ".join(get_args(Aggregation))
            raise ValueError(f"aggregation={self.aggregation!r}: give one of {choices}")


def clipped_surrogate(
    tokens: LossTokens, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> TokenLoss:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7) with DAPO's two bounds (arXiv:2503.14476,
    eq. 8): -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    A token is clipped where the bound is the smaller term: its loss is constant and its gradient
    exactly 0. Other gradients are -ratio * A. Nothing is hidden: a ratio that overflows gives a
    loss or a gradient that is not finite. The old policy has the same weights, so that is a fault.
    """
    ratio_T, advantages_T = tokens.ratio_T, tokens.advantages_T
    too_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    too_low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    clipped_T = too_high_T | too_low_T
    bounded_T = ratio_T.detach().clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.where(clipped_T, bounded_T, ratio_T) * advantages_T
    return TokenLoss(loss_T, clipped_T)


def cross_entropy(tokens: LossTokens) -> TokenLoss:
    """Negative log-likelihood of the tokens, for supervised training."""
    return TokenLoss(-tokens.logprobs_T, torch.zeros_like(tokens.logprobs_T, dtype=torch.bool))


KL_BOUND = 20.0
"""Difference of logprobs from which on the exponential of `kl_T` continues as a straight line."""


def kl_T(logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """KL(policy || reference) per sampled token: exp(d) - d - 1, d = reference - logprobs.

    GRPO (arXiv:2402.03300, eq. 4), the k3 estimator of Schulman, "Approximating KL Divergence"
    (2020). The gradient through logprobs_T is 1 - exp(d), as in GRPO; none goes to the reference.
    The value is on average KL(policy || reference). The gradient is not that of its mean, as the
    tokens are taken as given: on average it is the gradient of KL(reference || policy).

    Beyond KL_BOUND, exp(d) is its tangent there, exp(20) * (1 + d - 20): float32 would overflow at
    89, and a clamp would have no gradient where the policy is the farthest away. Value and gradient
    are continuous, and finite for all logprobs that are.
    """
    difference_T = reference_logprobs_T.detach() - logprobs_T
    far_T = difference_T > KL_BOUND
    curve_T = torch.expm1(difference_T.masked_fill(far_T, KL_BOUND))
    line_T = math.expm1(KL_BOUND) + math.exp(KL_BOUND) * (difference_T - KL_BOUND)
    return torch.where(far_T, line_T, curve_T) - difference_T


LOSSES: dict[str, Loss] = {
    # arXiv:2402.03300
    "grpo": Loss(clipped_surrogate, "std", "sequence"),
    # arXiv:2503.20783
    "dr_grpo": Loss(clipped_surrogate, "centred", "constant"),
}

CROSS_ENTROPY = Loss(cross_entropy, aggregation="token")
