"""A batch of sequences for formulas: packed as the trainer has it, padded as papers write it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mesh.rl.aggregation import loss_sum
from mesh.rl.losses import LossTokens
from mesh.rl.objective import Objective

LENGTHS = (3, 5, 1, 7, 2, 6)
ADVANTAGES = (1.5, -0.75, 0.4, -2.0, 0.0, 0.9)


@dataclass(frozen=True)
class Batch:
    """B sequences of up to L loss tokens. Padding has logprobs of 0."""

    logprobs_BL: Tensor
    old_BL: Tensor
    other_BL: Tensor
    advantages_B: Tensor
    mask_BL: Tensor

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BL.sum(1)

    def packed(self) -> LossTokens:
        """Its loss tokens, end to end; the gradient goes back to `logprobs_BL`. The generator's
        logprobs and the reference's are `other_BL`."""
        lengths_B = self.lengths_B.long()
        sequence_T = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
        inside_BL = self.mask_BL.bool()
        other_T = self.other_BL[inside_BL]
        return LossTokens(
            self.logprobs_BL[inside_BL], self.old_BL[inside_BL], self.advantages_B[sequence_T],
            sequence_T, generator_logprobs_T=other_T, reference_logprobs_T=other_T,
        )  # fmt: skip


def batch_of(spread: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Old logprobs differ by up to `spread`; where it is 0, by nothing."""
    generator = torch.Generator().manual_seed(seed)
    size = len(LENGTHS), max(LENGTHS)
    mask_BL = (torch.arange(size[1]) < torch.tensor(LENGTHS)[:, None]).to(dtype)
    first_BL, second_BL, third_BL = torch.rand(3, *size, generator=generator, dtype=dtype)
    logprobs_BL = -3 * first_BL * mask_BL
    old_BL = logprobs_BL + spread * (2 * second_BL - 1) * mask_BL
    other_BL = logprobs_BL + (third_BL - 0.5) * mask_BL
    advantages_B = torch.tensor(ADVANTAGES, dtype=dtype)
    return Batch(logprobs_BL.requires_grad_(), old_BL, other_BL, advantages_B, mask_BL)


def loss_of(objective: Objective, batch: Batch) -> Tensor:
    """The loss of a step that has this batch and nothing else, as the program computes it."""
    lengths_B = batch.lengths_B.long()
    loss_T = objective(batch.packed()).loss_T
    weights_B = objective.weights(lengths_B).to(loss_T.dtype)
    if objective.loss.aggregation == "sequence":  # without the rounding to float32
        weights_B = 1 / lengths_B.to(loss_T.dtype)
    weights_T = weights_B.repeat_interleave(lengths_B)
    total = loss_sum(loss_T, weights_T)
    return total / objective.normaliser(int(lengths_B.sum()), len(lengths_B))


def gradient_of(loss: Tensor, batch: Batch) -> Tensor:
    """By the policy's logprobs, padding included."""
    (gradient_BL,) = torch.autograd.grad(loss, batch.logprobs_BL)
    return gradient_BL
