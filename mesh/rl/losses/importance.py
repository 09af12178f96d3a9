"""Weights for a generator whose logprobs are not the trainer's: samples of one policy, gradients of
another. With equal bits every weight is 1, and none is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mesh.rl.losses.sequences import sequence_sums

Kind = Literal["tis", "mask"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Importance:
    """The correction of a generator that is not exact.

    With w = p_trainer / p_generator under the weights that sampled, of a token, or of a sequence
    the product over its loss tokens:
    `tis`: the loss is multiplied by w, clamped to [low, high] (truncated importance sampling, Yao
    et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025).
    `mask`: by w where low <= w <= high, and by 0 elsewhere (Liu et al., "When Speed Kills
    Stability", 2025; IcePop, arXiv:2510.18855).
    Neither has a gradient. What is masked still counts in what the step's loss is divided by.
    """

    kind: Kind
    level: Level
    low: float
    high: float

    def weights(
        self, trainer_logprobs_T: Tensor, generator_logprobs_T: Tensor, sequence_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Factors of the tokens' losses, detached, and bool bounded_T: those beyond the bounds."""
        difference_T = (trainer_logprobs_T - generator_logprobs_T).detach()
        if self.level == "sequence":
            difference_T = sequence_sums(difference_T, sequence_T)
        ratio_T = torch.exp(difference_T)
        bounded_T = (ratio_T < self.low) | (ratio_T > self.high)
        if self.kind == "tis":
            return ratio_T.clamp(self.low, self.high), bounded_T
        return ratio_T.masked_fill(bounded_T, 0), bounded_T
