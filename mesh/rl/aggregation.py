"""Sums over the tokens of a step: how much each counts, and what the sum is divided by.

A pass's loss is the unnormalised sum of weight * loss over its loss tokens; the step divides the
accumulated gradient once, by `normaliser`. So the sum over passes, waves and ranks is the loss of
the step, however it was cut.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "sum", "constant"]


def token_weights(lengths_R: Tensor, aggregation: Aggregation) -> Tensor:
    """float32 weights_R: how much each token of rollout r counts in the sum of losses.

    `sequence` (GRPO, arXiv:2402.03300, eq. 3): 1 / length, so that every response counts the same.
    `token` (DAPO, arXiv:2503.14476, eq. 8), `sum` (RLOO, arXiv:2402.14740) and
    `constant` (Dr. GRPO, arXiv:2503.20783, section 3.2): 1. An empty response has no token to weigh
    and gets 0. Raises ValueError for an unknown aggregation.
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
    """Divisor of the whole step's sum. The counts are those of all ranks and waves.

    `token`: loss tokens; `sequence` and `sum`: rollouts, for the mean of their means or of their
    sums; `constant`: rollouts * constant_length, which takes the response length out of the loss
    (Dr. GRPO, arXiv:2503.20783, section 3.2). Rollouts that
    were left out do not count: with drop_equal_groups every divisor is the smaller. A step with
    nothing in it (every group dropped) has a sum of 0 and gets 1. Raises ValueError for an unknown
    aggregation, and for a constant_length below 1 where it is used.
    """
    _check(aggregation)
    if aggregation == "constant" and constant_length < 1:
        raise ValueError(f"constant_length={constant_length}: give the longest response, 1 or more")
    divisors = {
        "token": num_tokens,
        "sequence": num_sequences,
        "sum": num_sequences,
        "constant": num_sequences * constant_length,
    }
    return float(divisors[aggregation] or 1)


def loss_sum(loss_T: Tensor, weights_T: Tensor) -> Tensor:
    """Unnormalised loss of a pass: the sum of weight * loss, with a graph at T = 0 too."""
    return (loss_T * weights_T).sum()


def _check(aggregation: str) -> None:
    if aggregation not in get_args(Aggregation):
        choices = ", ".join(get_args(Aggregation))
        raise ValueError(f"aggregation={aggregation!r}: choose one of {choices}")
