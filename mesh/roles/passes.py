"""One pass of the trainer: what is scored of it first, and what training on it adds up.

A pass is the leaves that share a forward pass. Its inputs come in two phases. `PassScores` holds
what is known before any gradient: it is scored first. `backward` then trains on the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mesh.lifecycle.heartbeat import heartbeat
from mesh.model.attention import packed_context
from mesh.model.logprobs import TokenScores
from mesh.model.policy import Policy
from mesh.rl.aggregation import loss_sum
from mesh.rl.losses import LossTokens, Need
from mesh.rl.objective import Objective
from mesh.rl.packing import PackedBatch
from mesh.rl.statistics import token_stats
from mesh.rl.step import Pass
from mesh.roles.nonfinite import Trained
from mesh.roles.sums import StepSums

SCORED: frozenset[Need] = frozenset({"reference_logprobs"})
"""Needs for which passes are scored first."""


@dataclass(frozen=True)
class PassScores:
    """What is known of one pass's loss tokens before it is trained on; None unless it is needed.

    old_logprobs_A: the trainer's before the step's first update, where there are several.
    reference_logprobs_A: of the frozen reference.
    """

    old_logprobs_A: torch.Tensor | None = None
    reference_logprobs_A: torch.Tensor | None = None


def forward(model: Policy, batch: PackedBatch, temperature: float) -> TokenScores:
    """(logprobs_A, entropy_A) of a batch's loss tokens."""
    heartbeat()
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    return model(batch.tokens_T, batch.positions_T, context, batch.index_A, batch.targets_A,
                 temperature)  # fmt: skip


@torch.no_grad()
def score_pass(
    batch: PackedBatch,
    model: Policy,
    reference: Policy | None,
    needs: frozenset[Need],
    policy: bool,
    temperature: float,
    sums: StepSums,
) -> PassScores:
    """Score a pass before any gradient: what is needed of other models, and, with `policy`, its old
    logprobs, whose difference from the generator's goes into `sums`."""
    old_A = reference_A = None
    if policy:
        old_A = forward(model, batch, temperature).logprobs_A
        sums.add_before(
            token_stats(old_A, batch.generator_logprobs_A, old_A, torch.zeros_like(old_A).bool())
        )
    if "reference_logprobs" in needs:
        assert reference is not None, "a reference is needed, and none is kept"
        reference_A = forward(reference, batch, temperature).logprobs_A
    return PassScores(old_A, reference_A)


def old_logprobs(known: Sequence[PassScores], trained_A: torch.Tensor) -> torch.Tensor:
    """The trainer's logprobs before the step's first update, of passes that are scored or else, as
    `trained_A` was, trained on by that update."""
    scored = [one.old_logprobs_A for one in known if one.old_logprobs_A is not None]
    assert len(scored) in (0, len(known)), "some passes were scored, and others were not"
    return torch.cat(scored) if scored else trained_A


def loss_tokens(
    logprobs_A: torch.Tensor, batch: PackedBatch, known: PassScores, needs: frozenset[Need]
) -> LossTokens:
    """What the loss sees of a batch.

    The old logprobs are the trainer's before the step's first update where passes are scored for
    several, and with `trainer_logprobs`: of a step with one update they are those of now.
    """
    old_A = batch.old_logprobs_A
    if known.old_logprobs_A is not None:
        old_A = known.old_logprobs_A
    elif "trainer_logprobs" in needs:
        old_A = logprobs_A.detach()
    return LossTokens(
        logprobs_A, old_A, batch.advantages_A, batch.sequence_A,
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
    tokens = loss_tokens(logprobs_A, batch, known, objective.needs)
    loss_A, clipped_A, measured = objective(tokens)
    loss = loss_sum(loss_A, batch.weights_A)
    loss.backward()
    old_A = tokens.old_logprobs_T
    sums.add(
        token_stats(logprobs_A, batch.generator_logprobs_A, old_A, clipped_A),
        loss,
        {"entropy": entropy_A, **measured},
        Trained(
            tuple(r for leaf in leaves for r in leaf.rollouts), logprobs_A.detach(),
            loss_A.detach(), logprobs_A.grad,
        ),
    )  # fmt: skip
    return TokenScores(logprobs_A.detach(), entropy_A.detach())
