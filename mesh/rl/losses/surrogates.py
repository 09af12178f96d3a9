"""Surrogates: what a token contributes to the loss, given its ratio and its advantage.

Each is a function of `LossTokens`; what it is averaged with is the row's in `table.py`. Nothing is
hidden: a ratio that overflows gives a loss or a gradient that is not finite. The old policy has the
same weights, or those of a few updates before, so that is a fault.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh.rl.losses.nouns import LossTokens, TokenLoss
from mesh.rl.losses.sequences import sequence_means, sequence_sums


def clipped_surrogate(
    tokens: LossTokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7) with DAPO's two bounds (arXiv:2503.14476,
    eq. 8): -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    dual_clip: where A < 0, the ratio counts as at most this c (dual-clip PPO, Ye et al.,
    arXiv:1912.09729; `clip_ratio_c` of verl, `delta` of TRL).
    A token is clipped where a bound is taken: its loss is constant and its gradient exactly 0.
    Other gradients are -ratio * A.
    """
    return clipped(tokens.ratio_T, tokens.advantages_T, clip_low, clip_high, dual_clip)


def clipped(
    ratio_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> TokenLoss:
    """The clipped surrogate of any ratio."""
    too_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    too_low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    clipped_T = too_high_T | too_low_T
    bounded_T = ratio_T.detach().clamp(1 - clip_low, 1 + clip_high)
    if dual_clip is not None:
        beyond_T = (ratio_T > dual_clip) & (advantages_T < 0)
        bounded_T = bounded_T.masked_fill(beyond_T, dual_clip)
        clipped_T = clipped_T | beyond_T
    loss_T = -torch.where(clipped_T, bounded_T, ratio_T) * advantages_T
    return TokenLoss(loss_T, clipped_T)


def gspo_surrogate(
    tokens: LossTokens,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
) -> TokenLoss:
    """The clipped surrogate with one ratio for a sequence: exp of the mean log-ratio of its loss
    tokens (GSPO, arXiv:2507.18071, eqs. 5 and 7; the bounds are those of its section 5.1).

    As GSPO-token (eqs. 13 and 14): the ratio is a constant, and each token's gradient is
    -ratio * A. Weighed by 1 / length and added over a sequence, that is the gradient of eq. 5.
    """
    log_ratio_T = sequence_means(_log_ratio(tokens), tokens.sequence_T)
    ratio_T = _carried(log_ratio_T, tokens.logprobs_T)
    return clipped(ratio_T, tokens.advantages_T, clip_low, clip_high, dual_clip)


def rloo_surrogate(
    tokens: LossTokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """The clipped surrogate with the probability ratio of a whole sequence, whose log is the sum of
    its tokens' log-ratios (RLOO, arXiv:2402.14740; clipped as in TRL's RLOOTrainer).

    A token's value is its share of the sequence's loss, 1 / length, its gradient -ratio * A.
    Added over a sequence, that is the loss and the gradient of the sequence.
    """
    log_ratio_T = sequence_sums(_log_ratio(tokens), tokens.sequence_T)
    lengths_T = sequence_sums(torch.ones_like(log_ratio_T), tokens.sequence_T)
    ratio_T = _carried(log_ratio_T, tokens.logprobs_T)
    loss_T, clipped_T = clipped(ratio_T, tokens.advantages_T, clip_low, clip_high, dual_clip)
    value_T = loss_T.detach()
    return TokenLoss(loss_T - value_T + value_T / lengths_T, clipped_T)


def cispo_surrogate(tokens: LossTokens, *, clip_high: float = 4.0) -> TokenLoss:
    """-min(ratio, 1 + clip_high) * A * logprob, with the ratio as a constant (CISPO,
    arXiv:2506.13585, eqs. 4 and 5, without a lower bound as there).

    No token loses its gradient: those beyond the bound, which are marked as clipped, have a smaller
    one. The paper does not give its bound; 1 + 4 is that of ScaleRL (arXiv:2510.13786) and of TRL.
    """
    ratio_T = tokens.ratio_T.detach()
    weight_T = ratio_T.clamp(max=1 + clip_high)
    return TokenLoss(-weight_T * tokens.advantages_T * tokens.logprobs_T, ratio_T > 1 + clip_high)


def sapo_surrogate(
    tokens: LossTokens, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> TokenLoss:
    """-(4 / tau) * sigmoid(tau * (ratio - 1)) * A, where tau is `tau_positive` for A > 0 and else
    `tau_negative` (SAPO, arXiv:2511.20347, as in TRL and in verl's
    compute_policy_loss_sapo).

    At ratio 1 the gradient is that of the plain ratio; away from it the gate closes smoothly, and
    faster with a larger tau. Nothing is clipped.
    """
    taus_T = torch.full_like(tokens.advantages_T, tau_negative)
    taus_T = taus_T.masked_fill(tokens.advantages_T > 0, tau_positive)
    gate_T = torch.sigmoid(taus_T * (tokens.ratio_T - 1)) * 4 / taus_T
    return TokenLoss(-gate_T * tokens.advantages_T, _none(tokens))


def cross_entropy(tokens: LossTokens) -> TokenLoss:
    """Negative log-likelihood of the tokens, for supervised training."""
    return TokenLoss(-tokens.logprobs_T, _none(tokens))


def _log_ratio(tokens: LossTokens) -> Tensor:
    return (tokens.logprobs_T - tokens.old_logprobs_T).detach()


def _carried(log_ratio_T: Tensor, logprobs_T: Tensor) -> Tensor:
    """exp of a constant, with the gradient of its token's probability: that of exp(logprob)."""
    return torch.exp(log_ratio_T + (logprobs_T - logprobs_T.detach()))


def _none(tokens: LossTokens) -> Tensor:
    return torch.zeros_like(tokens.logprobs_T, dtype=torch.bool)
