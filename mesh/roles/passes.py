"""One pass of the trainer: what is scored of it first, and what training on it adds up.

A pass is the leaves that share a forward pass. Its inputs come in two phases. `PassScores` holds
what is known before any gradient: it is scored first. `backward` then trains on the pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mesh.lifecycle.heartbeat import heartbeat
from mesh.model.attention import packed_context
from mesh.model.logprobs import TokenScores
from mesh.model.policy import Policy
from mesh.rl.aggregation import loss_sum
from mesh.rl.losses import LossTokens
from mesh.rl.objective import Objective
from mesh.rl.packing import PackedBatch
from mesh.rl.statistics import token_stats
from mesh.rl.step import Pass
from mesh.roles.nonfinite import Trained
from mesh.roles.sums import StepSums


@dataclass(frozen=True)
class PassScores:
    """Logprobs of one pass's loss tokens that are known before it is trained on."""

    reference_logprobs_A: torch.Tensor | None = None


def forward(model: Policy, batch: PackedBatch, temperature: float) -> TokenScores:
    """(logprobs_A, entropy_A) of a batch's loss tokens."""
    heartbeat()
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    return model(batch.tokens_T, batch.positions_T, context, batch.index_A, batch.targets_A,
                 temperature)  # fmt: skip


def loss_tokens(logprobs_A: torch.Tensor, batch: PackedBatch, known: PassScores) -> LossTokens:
    """What the loss sees of a batch."""
    return LossTokens(
        logprobs_A, batch.old_logprobs_A, batch.advantages_A, batch.sequence_A,
        generator_logprobs_T=batch.generator_logprobs_A,
        reference_logprobs_T=known.reference_logprobs_A,
    )  # fmt: skip


def backward(
    model: Policy,
    batch: PackedBatch,
    leaves: Pass,
    objective: Objective,
    known: PassScores,
    temperature: float,
    sums: StepSums,
) -> TokenScores:
    """Add a pass to the model's gradients and to the step's sums; its scores, detached.

    batch: `leaves`, packed, on the device.
    """
    logprobs_A, entropy_A = forward(model, batch, temperature)
    logprobs_A.retain_grad()
    tokens = loss_tokens(logprobs_A, batch, known)
    loss_A, clipped_A, kl_A = objective(tokens)
    loss = loss_sum(loss_A, batch.weights_A)
    loss.backward()
    kl_A = torch.zeros_like(entropy_A) if kl_A is None else kl_A
    old_A = tokens.old_logprobs_T
    sums.add(
        token_stats(logprobs_A, batch.generator_logprobs_A, old_A, clipped_A),
        (loss, entropy_A.double().sum(), kl_A.double().sum()),
        Trained(
            tuple(r for leaf in leaves for r in leaf.rollouts), logprobs_A.detach(),
            loss_A.detach(), logprobs_A.grad,
        ),
    )  # fmt: skip
    return TokenScores(logprobs_A.detach(), entropy_A.detach())
