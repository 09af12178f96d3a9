"""The nouns of a loss: its tokens, what it needs beside them, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mesh.rl.advantages import Advantage
from mesh.rl.aggregation import Aggregation

Need = Literal[
    "reference_logprobs",
    "teacher_logprobs",
    "teacher_kl",
    "trainer_logprobs",
    "sequence_ratio",
    "entropy_gradient",
    "step_statistics",
]
"""Inputs of a loss beyond its own tokens: logprobs of another model, scored before the advantages;
the KL to the teacher over the whole vocabulary, that can be differentiated;
old logprobs by the trainer, where the generator's are not equal to them; all tokens of a sequence
in one call; an entropy that can be differentiated; all groups of the step in one call of
`advantage`."""


@dataclass(frozen=True)
class LossTokens:
    """T loss tokens, sequence by sequence; the gradient goes through `logprobs_T`.

    old_logprobs_T: of the policy that drew the tokens, against which the ratio is taken: as the
    generator has them; where a step has several updates, and with `trainer_logprobs`, as the
    trainer has them before the first of them. advantages_T: one per token; sequence_T: int64, the
    sequence that each token belongs to, ascending; generator_logprobs_T: as the tokens were
    sampled. None unless they are needed: entropy_T, of each token's distribution,
    reference_logprobs_T, of the frozen starting model, teacher_logprobs_T, and teacher_kl_T, of
    each token's distribution from the teacher's. The gradient goes through entropy_T and
    teacher_kl_T too.
    """

    logprobs_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor
    sequence_T: Tensor
    generator_logprobs_T: Tensor | None = None
    entropy_T: Tensor | None = None
    reference_logprobs_T: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None
    teacher_kl_T: Tensor | None = None

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
`clip_low`, `clip_high` and `dual_clip` are keys of the run, all others keys of `loss_args`."""


@dataclass(frozen=True)
class Loss:
    """One way to learn from scored rollouts.

    advantage: a named kind, or a function float64 rewards_PG -> advantages_PG. credit: advantages
    of single tokens, from tokens that have their rollout's; unset: these stay. settings: values of
    the surrogate's keyword parameters, where they differ from the function's own defaults.
    widest: largest clip_low and clip_high that make sense, where the ratio is no token's.
    teacher_coef: weight of the KL to the teacher.
    """

    surrogate: Surrogate
    advantage: Advantage | Callable[[Tensor], Tensor] = "std"
    aggregation: Aggregation = "token"
    needs: frozenset[Need] = frozenset()
    credit: Callable[[LossTokens], Tensor] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    widest: float | None = None
    teacher_coef: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for an advantage or aggregation that does not exist."""
        if isinstance(self.advantage, str) and self.advantage not in get_args(Advantage):
            choices = ", ".join(get_args(Advantage))
            raise ValueError(f"advantage={self.advantage!r}: give a function, or one of {choices}")
        if self.aggregation not in get_args(Aggregation):
            choices = ", ".join(get_args(Aggregation))
            raise ValueError(f"aggregation={self.aggregation!r}: give one of {choices}")
