"""One pass of the trainer: what is scored of it first, and what training on it adds up.

A pass is the leaves that share a forward pass. Its inputs come in two phases. `PassScores` holds
what is known before any gradient: it is scored first. `backward` then trains on the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mesh.lifecycle.heartbeat import heartbeat
from mesh.model.attention import packed_context
from mesh.model.divergence import HeadInputs
from mesh.model.logprobs import TaughtScores, TokenScores
from mesh.model.policy import Policy
from mesh.model.token_sets import TokenSets
from mesh.rl.aggregation import loss_sum
from mesh.rl.losses import LossTokens, Need
from mesh.rl.objective import Objective
from mesh.rl.packing import PackedBatch
from mesh.rl.statistics import token_stats
from mesh.rl.step import Pass
from mesh.roles.nonfinite import Trained
from mesh.roles.sums import StepSums
from mesh.types import Distribution, Rollout

SCORED: frozenset[Need] = frozenset({"reference_logprobs", "teacher_logprobs"})
"""Needs for which passes are scored first."""


Credit = tuple[Sequence[Rollout], torch.Tensor]
"""Rollouts, and the advantages of their loss tokens one after the other."""


@dataclass(frozen=True)
class PassScores:
    """What is known of one pass's loss tokens before it is trained on; None unless it is needed.

    old_logprobs_A: the trainer's before the step's first update, where there are several, and
    old_entropy_A: the entropies of the same distributions.
    reference_logprobs_A, teacher_logprobs_A: of frozen models. sets: the truncated sets of the
    policy that drew the tokens, kept for other weights and models; without them a pass derives its
    own.
    """

    old_logprobs_A: torch.Tensor | None = None
    reference_logprobs_A: torch.Tensor | None = None
    teacher_logprobs_A: torch.Tensor | None = None
    sets: TokenSets | None = None
    old_entropy_A: torch.Tensor | None = None


def forward(
    model: Policy, batch: PackedBatch, at: Distribution, sets: TokenSets | None = None
) -> TokenScores:
    """(logprobs_A, entropy_A) of a batch's loss tokens, of the distribution `at`, over these sets;
    without them the model's own, if it is truncated."""
    heartbeat()
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    return model(batch.tokens_T, batch.positions_T, context, batch.index_A, batch.targets_A,
                 at.temperature, None, sets or derived_sets(at))  # fmt: skip


def derived_sets(at: Distribution, keeps: bool = False) -> TokenSets | None:
    """Sets that the next forward pass derives from its logits; None: nothing is truncated."""
    return TokenSets(at, keeps) if at.truncated else None


def head_inputs(model: Policy, batch: PackedBatch) -> HeadInputs:
    """A batch's hidden states before the head, and the head's weight, which FSDP leaves gathered
    until it is sharded again."""
    heartbeat()
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    return model(batch.tokens_T, batch.positions_T, context, batch.index_A, None, 1.0)


def taught_forward(
    model: Policy, teacher: Policy, batch: PackedBatch, at: Distribution,
    sets: TokenSets | None = None,
) -> TaughtScores:  # fmt: skip
    """The policy's scores of a batch's loss tokens, with the KL to the teacher at each."""
    with torch.no_grad():
        inputs = head_inputs(teacher, batch)
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    return model(batch.tokens_T, batch.positions_T, context, batch.index_A, batch.targets_A,
                 at.temperature, inputs, sets or derived_sets(at))  # fmt: skip


@torch.no_grad()
def score_pass(
    batch: PackedBatch,
    model: Policy,
    others: Mapping[Need, Policy | None],
    needs: frozenset[Need],
    policy: bool,
    at: Distribution,
    sums: StepSums,
) -> PassScores:
    """Score a pass before any gradient: what is needed of other models, and, with `policy`, its old
    logprobs, whose difference from the generator's goes into `sums`. others: by what is needed of
    them. Truncated sets are the policy's for all of them."""
    old_A, entropy_A, kept = None, None, derived_sets(at, keeps=True)
    found: dict[str, torch.Tensor] = {}
    if policy or kept is not None:
        now = forward(model, batch, at, kept)
        old_A, entropy_A = now if policy else (None, None)
    if old_A is not None:
        sums.add_before(
            token_stats(old_A, batch.generator_logprobs_A, old_A, torch.zeros_like(old_A).bool())
        )
    for need in sorted(needs & SCORED):
        other = others[need]
        assert other is not None, f"{need} are needed, and no such model is kept"
        found[f"{need}_A"] = forward(other, batch, at, kept).logprobs_A
    return PassScores(old_A, **found, sets=kept, old_entropy_A=entropy_A)


def old_scores(known: Sequence[PassScores], trained: TokenScores) -> TokenScores:
    """The trainer's scores before the step's first update, of passes that are scored or else, as
    `trained` was, trained on by that update."""
    logprobs = [one.old_logprobs_A for one in known if one.old_logprobs_A is not None]
    entropies = [one.old_entropy_A for one in known if one.old_entropy_A is not None]
    assert len(logprobs) == len(entropies) in (0, len(known)), (
        "some passes were scored, and others were not"
    )
    return TokenScores(torch.cat(logprobs), torch.cat(entropies)) if logprobs else trained


def loss_tokens(
    scores: TokenScores | TaughtScores, batch: PackedBatch, known: PassScores,
    needs: frozenset[Need],
) -> LossTokens:  # fmt: skip
    """What the loss sees of a batch.

    The old logprobs are the trainer's before the step's first update where passes are scored for
    several, and with `trainer_logprobs`: of a step with one update they are those of now.
    """
    logprobs_A = scores.logprobs_A
    old_A = batch.old_logprobs_A
    if known.old_logprobs_A is not None:
        old_A = known.old_logprobs_A
    elif "trainer_logprobs" in needs:
        old_A = logprobs_A.detach()
    return LossTokens(
        logprobs_A, old_A, batch.advantages_A, batch.sequence_A,
        generator_logprobs_T=batch.generator_logprobs_A,
        entropy_T=scores.entropy_A if "entropy_gradient" in needs else None,
        reference_logprobs_T=known.reference_logprobs_A,
        teacher_logprobs_T=known.teacher_logprobs_A,
        teacher_kl_T=scores.divergence_A if isinstance(scores, TaughtScores) else None,
    )  # fmt: skip


def backward(
    model: Policy,
    batch: PackedBatch,
    leaves: Pass,
    objective: Objective,
    known: PassScores,
    at: Distribution,
    sums: StepSums,
    teacher: Policy | None = None,
) -> tuple[TokenScores, torch.Tensor]:
    """Add a pass to the model's gradients and to the step's sums; its scores, detached, and the
    advantages of its tokens.

    batch: `leaves`, packed, on the device. teacher: where the objective needs the KL to it.
    """
    scores: TokenScores | TaughtScores = (
        forward(model, batch, at, known.sets)
        if teacher is None
        else taught_forward(model, teacher, batch, at, known.sets)
    )
    logprobs_A, entropy_A = scores.logprobs_A, scores.entropy_A
    logprobs_A.retain_grad()
    tokens = objective.credited(loss_tokens(scores, batch, known, objective.needs))
    loss_A, clipped_A, measured = objective.terms(tokens)
    loss = loss_sum(loss_A, batch.weights_A)
    loss.backward()
    old_A = tokens.old_logprobs_T
    sums.add(
        token_stats(logprobs_A, batch.generator_logprobs_A, old_A, clipped_A),
        loss,
        {"entropy": entropy_A, **measured},
        Trained(
            tuple(r for leaf in leaves for r in leaf.rollouts), logprobs_A.detach(),
            loss_A.detach(), gradient_of(logprobs_A),
        ),
    )  # fmt: skip
    return TokenScores(logprobs_A.detach(), entropy_A.detach()), tokens.advantages_T


def joined_scores(
    found: Sequence[tuple[TokenScores, torch.Tensor]], nothing: torch.Tensor
) -> tuple[TokenScores, torch.Tensor]:
    """Scores and advantages of passes, in order, as those of one."""
    scores, advantages = zip((TokenScores(nothing, nothing), nothing), *found, strict=True)
    logprobs, entropies = zip(*scores, strict=True)
    return TokenScores(torch.cat(logprobs), torch.cat(entropies)), torch.cat(advantages)


def gradient_of(logprobs_A: torch.Tensor) -> torch.Tensor:
    """The gradient that came through the logprobs; zeros where the loss does not use them."""
    found = logprobs_A.grad
    return torch.zeros_like(logprobs_A) if found is None else found.detach()
