"""Losses: from the logprobs, advantages and old logprobs of tokens to a loss for each of them.

`nouns` says what a loss is, `surrogates` has the formulas that ship, `table` names them,
`divergence` estimates the KL to another policy, `distillation` follows a teacher, `importance`
corrects for a generator that is not exact, and `sequences` sums over sequences. A new loss is a
function of `LossTokens`, a row, and a test.

Nothing here divides by a count: see `mesh/rl/aggregation.py`.
"""

from mesh.rl.losses.distillation import TeacherKL, log_ratio_T, taught_advantages
from mesh.rl.losses.divergence import DIVERGENCES, KL_BOUND, Divergence, kl_T
from mesh.rl.losses.importance import Importance
from mesh.rl.losses.nouns import Loss, LossTokens, Need, Surrogate, TokenLoss
from mesh.rl.losses.sequences import sequence_sums
from mesh.rl.losses.surrogates import clipped_surrogate, cross_entropy
from mesh.rl.losses.table import CROSS_ENTROPY, LOSSES

__all__ = [
    "CROSS_ENTROPY",
    "DIVERGENCES",
    "KL_BOUND",
    "LOSSES",
    "Divergence",
    "Importance",
    "Loss",
    "LossTokens",
    "Need",
    "Surrogate",
    "TeacherKL",
    "TokenLoss",
    "clipped_surrogate",
    "cross_entropy",
    "kl_T",
    "log_ratio_T",
    "sequence_sums",
    "taught_advantages",
]
