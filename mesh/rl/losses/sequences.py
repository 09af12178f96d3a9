"""Sums over the tokens of each sequence of a pass, in an order that the sequence alone decides."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sums(x_T: Tensor, sequence_T: Tensor) -> Tensor:
    """The sum of x over the sequence that each token belongs to, at every one of its tokens.

    sequence_T: ascending, as in `LossTokens`. Neighbours are added along a binary tree that begins
    at the sequence's first token, by elementwise operations alone: the bits depend on the
    sequence's own numbers, not on the pass, its length or the sequence's place in it. On a GPU
    nothing waits for the device. Use it without a gradient, whose sums autograd would order:
    `gspo_surrogate` shows how.
    """
    place_T = torch.arange(len(x_T), device=x_T.device)
    begins_T = torch.ones_like(sequence_T, dtype=torch.bool)
    begins_T[1:] = sequence_T[1:] != sequence_T[:-1]
    start_T = place_T.where(begins_T, 0).cummax(0).values if len(x_T) else place_T
    index_T, reach = place_T - start_T, 1
    while reach < len(x_T):
        later_T, same_T = x_T.roll(-reach), sequence_T == sequence_T.roll(-reach)
        # beyond the end of the pass, roll begins again at its front
        adds_T = same_T & (index_T % (2 * reach) == 0) & (place_T < len(x_T) - reach)
        x_T = torch.where(adds_T, x_T + later_T, x_T)
        reach *= 2
    return x_T[start_T]


def sequence_means(x_T: Tensor, sequence_T: Tensor) -> Tensor:
    """The mean of x over the tokens of each token's sequence, at every one of them."""
    return sequence_sums(x_T, sequence_T) / sequence_sums(torch.ones_like(x_T), sequence_T)
