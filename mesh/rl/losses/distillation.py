"""Distillation from a teacher on the policy's own tokens: the reverse KL, KL(policy || teacher).

On-policy distillation (arXiv:2306.13649, GKD, with all data from the student and the reverse KL;
MiniLLM, arXiv:2306.08543) trains on what the policy itself does: it minimises, at every token that
it drew, how far its distribution is from the teacher's. Later tokens are not credited: the gradient
is that of each token's own KL, not of the whole sequence's.

`sampled`: log p - log q of the drawn token is an estimate of that KL, without bias. Its negative,
detached, is an advantage: with ratio 1 the gradient of -A * ratio is on average the KL's own, since
the mean of (log p - log q) * grad log p is. The mean of grad (log p - log q) itself is 0, and that
of the k3 estimate is the gradient of the forward KL, KL(teacher || policy).

`full`: the KL over the whole vocabulary with its exact gradient (`mesh/model/divergence.py`); no
sampling noise but that of the prefixes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mesh.rl.losses.nouns import LossTokens

TeacherKL = Literal["sampled", "full"]


def taught_advantages(tokens: LossTokens, coef: float) -> Tensor:
    """The tokens' advantages minus coef * (log p - log q), detached. With a ratio that is not 1 the
    policy's logprobs are the present ones, so that the gradient is that of its KL now.
    """
    assert tokens.teacher_logprobs_T is not None, "the teacher was not scored"
    return tokens.advantages_T - coef * log_ratio_T(tokens)


def log_ratio_T(tokens: LossTokens) -> Tensor:
    """log p - log q of the tokens, detached: an estimate of KL(policy || teacher)."""
    assert tokens.teacher_logprobs_T is not None, "the teacher was not scored"
    return tokens.logprobs_T.detach() - tokens.teacher_logprobs_T


def no_reward(rewards_PG: Tensor) -> Tensor:
    """Advantages of 0, whatever the rewards: the teacher alone is followed."""
    return torch.zeros_like(rewards_PG)
