"""Losses as users write them."""

from __future__ import annotations

from itertools import count

import torch

from mesh.rl.losses import Loss, LossTokens, TokenLoss
from mesh.rl.trial import LENGTHS

calls = count()


def asymmetric(tokens: LossTokens, *, negative: float = 1.0) -> TokenLoss:
    """-ratio * A, in which a negative A counts `negative` times."""
    advantages_T = tokens.advantages_T
    weighted_T = torch.where(advantages_T < 0, negative * advantages_T, advantages_T)
    unclipped_T = torch.zeros_like(advantages_T, dtype=torch.bool)
    return TokenLoss(-tokens.ratio_T * weighted_T, unclipped_T)


def unrepeatable(tokens: LossTokens) -> TokenLoss:
    """A little more at each call than at the one before, on more tokens than the start tries."""
    loss_T, clipped_T = asymmetric(tokens, negative=0.5)
    more = next(calls) / 1024 if len(loss_T) > sum(LENGTHS) else 0.0
    return TokenLoss(loss_T * (1 + more), clipped_T)


ASYMMETRIC = Loss(asymmetric, advantage="std", aggregation="sequence")
UNREPEATABLE = Loss(unrepeatable)
