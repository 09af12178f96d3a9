"""Estimates of KL(policy || other) per sampled token (Schulman, "Approximating KL Divergence",
2020), with d = other - policy, the difference of logprobs.

| | value | gradient through the policy's logprob | its mean on-policy |
| --- | --- | --- | --- |
| k1 | -d | 1 | 0: none |
| k2 | d^2 / 2 | -d | that of KL(policy || other) |
| k3 | exp(d) - d - 1 | 1 - exp(d) | that of KL(other || policy) |

All three are on average about KL(policy || other), k1 and k3 exactly. In a loss the tokens are
taken as given, so what is learned is the last column: k1 would only add noise to the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["k1", "k2", "k3"]

KL_BOUND = 20.0
"""Difference of logprobs from which on the exponential of `k3_T` continues as a straight line."""


def k1_T(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    """The log-ratio itself, which may be negative. For rewards; not for a loss."""
    return logprobs_T - other_logprobs_T.detach()


def k2_T(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    """Half the squared log-ratio. Its gradient is on average that of KL(policy || other)."""
    return (logprobs_T - other_logprobs_T.detach()).square() / 2


def k3_T(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    """exp(d) - d - 1, GRPO's term (arXiv:2402.03300, eq. 4), as there with the gradient 1 - exp(d).

    Beyond KL_BOUND, exp(d) is its tangent there, exp(20) * (1 + d - 20): float32 would overflow at
    89, and a clamp would have no gradient where the policy is the farthest away. Value and gradient
    are continuous, and finite for all logprobs that are.
    """
    difference_T = other_logprobs_T.detach() - logprobs_T
    far_T = difference_T > KL_BOUND
    curve_T = torch.expm1(difference_T.masked_fill(far_T, KL_BOUND))
    line_T = math.expm1(KL_BOUND) + math.exp(KL_BOUND) * (difference_T - KL_BOUND)
    return torch.where(far_T, line_T, curve_T) - difference_T


kl_T = k3_T
"""The estimate that metrics report, whichever one is trained with."""

DIVERGENCES: Mapping[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1_T,
    "k2": k2_T,
    "k3": k3_T,
}
