"""The policy loss, token by token, and the sums that leave a microbatch.

Nothing here divides by a count. A leaf's loss is the unnormalised sum of weight * loss over its
response tokens; the step divides the accumulated gradient once, by `normaliser`. So a sum over
microbatches, waves and ranks is the loss of the step, however it was cut. T is the number of
response tokens given, the A tokens of a `PackedBatch`; it may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "constant"]


def policy_loss_T(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate: (loss_T, bool clipped_T); the gradient goes through logprobs_T only.

    loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) with ratio = exp(logprobs -
    old): PPO (arXiv:1707.06347, eq. 7), with the two bounds of DAPO (arXiv:2503.14476, eq. 8).
    Equal bits in both logprobs give a ratio of exactly 1. A token is clipped where the bound is the
    smaller term: its loss is constant and its gradient exactly 0. Other gradients are -ratio * A.
    Nothing is hidden: a ratio that overflows gives a loss or a gradient that is not finite.
    """
    ratio_T = torch.exp(logprobs_T - old_logprobs_T.detach())
    too_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    too_low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    clipped_T = too_high_T | too_low_T
    bounded_T = ratio_T.detach().clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.where(clipped_T, bounded_T, ratio_T) * advantages_T
    return loss_T, clipped_T


def kl_T(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """KL(policy || reference) per sampled token: exp(d) - d - 1, d = ref - logprobs.

    GRPO (arXiv:2402.03300, eq. 4), the k3 estimator of Schulman, "Approximating KL Divergence"
    (2020). The gradient through logprobs_T is 1 - exp(d), as in GRPO; none goes to the reference.
    """
    difference_T = ref_logprobs_T.detach() - logprobs_T
    return torch.expm1(difference_T) - difference_T


def token_weights(lengths_R: Tensor, aggregation: Aggregation) -> Tensor:
    """float32 weights_R: what each token of rollout r counts in the sum of losses.

    `sequence` (GRPO, arXiv:2402.03300, eq. 3): 1 / length, so that every response counts the same.
    `token` (DAPO, arXiv:2503.14476, eq. 8) and `constant` (Dr. GRPO, arXiv:2503.20783, section
    3.2): 1. An empty response has no token to weigh and gets 0. Raises ValueError for an unknown
    aggregation.
    """
    _check(aggregation)
    empty_R = lengths_R == 0
    if aggregation == "sequence":
        weights_R = 1 / lengths_R.to(torch.float64).clamp(min=1)
    else:
        weights_R = torch.ones_like(lengths_R, dtype=torch.float64)
    return weights_R.masked_fill(empty_R, 0.0).to(torch.float32)


def normaliser(
    num_tokens: int, num_sequences: int, aggregation: Aggregation, constant_length: int
) -> float:
    """What the whole step's sum is divided by, once. The counts are those of all ranks and waves.

    `token`: response tokens; `sequence`: rollouts; `constant`: rollouts * constant_length, which
    takes the response length out of the loss (Dr. GRPO, arXiv:2503.20783, section 3.2). A step with
    nothing in it (every group dropped) has a sum of 0 and gets 1. Raises ValueError for an unknown
    aggregation, and for a constant_length below 1 where it is used.
    """
    _check(aggregation)
    if aggregation == "constant" and constant_length < 1:
        raise ValueError(f"constant_length={constant_length}: give the longest response, 1 or more")
    divisors = {
        "token": num_tokens,
        "sequence": num_sequences,
        "constant": num_sequences * constant_length,
    }
    return float(divisors[aggregation] or 1)


def loss_sum(loss_T: Tensor, weights_T: Tensor) -> Tensor:
    """The unnormalised loss of a microbatch: sum of weight * loss, with a graph at T = 0 too."""
    return (loss_T * weights_T).sum()


def _check(aggregation: str) -> None:
    if aggregation not in ("token", "sequence", "constant"):
        raise ValueError(f"aggregation={aggregation!r}: choose 'token', 'sequence' or 'constant'")


@dataclass(frozen=True)
class TokenStats:
    """What tokens say about a step, so that parts merge: `sums` add, of `maxima` the largest stays.

    float64 on the tokens' device. `sums`: tokens, clipped tokens, |logprob difference|, ratio.
    `maxima`: |logprob difference|, ratio. Two all-reduces (SUM, MAX) merge them over ranks.
    """

    sums: Tensor
    maxima: Tensor


def token_stats(logprobs_T: Tensor, old_logprobs_T: Tensor, clipped_T: Tensor) -> TokenStats:
    """The statistics of T tokens; 0 tokens give the neutral element of `merge`."""
    difference_T = (logprobs_T - old_logprobs_T).detach().to(torch.float64)
    ratio_T = difference_T.exp()
    ones_T = torch.ones_like(ratio_T)
    summed = (ones_T, clipped_T.to(torch.float64), difference_T.abs(), ratio_T)
    floor = ratio_T.new_zeros(1)
    largest = [torch.cat([x_T, floor]).amax() for x_T in (difference_T.abs(), ratio_T)]
    return TokenStats(torch.stack([x_T.sum() for x_T in summed]), torch.stack(largest))


def merge(one: TokenStats, other: TokenStats) -> TokenStats:
    """The statistics of the tokens of both."""
    return TokenStats(one.sums + other.sums, torch.maximum(one.maxima, other.maxima))


def stats_metrics(stats: TokenStats) -> dict[str, float]:
    """The metrics of the merged statistics, under the names of `metrics.jsonl`; 0 for no tokens."""
    num_tokens, num_clipped, difference, ratio = stats.sums.tolist()
    difference_max, ratio_max = stats.maxima.tolist()
    count = max(num_tokens, 1.0)
    return {
        "logprob_diff/max": difference_max,
        "logprob_diff/mean": difference / count,
        "ratio/max": ratio_max,
        "ratio/mean": ratio / count,
        "clip_fraction": num_clipped / count,
    }
