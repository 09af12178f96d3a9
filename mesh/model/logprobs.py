"""Token logprobs from hidden states, over fixed vocabulary tiles: one function for both roles.

    logprob = z[target] - logsumexp(z),  z = hidden @ weight^T / temperature

The vocabulary is split into tiles independently of the mesh. A vocabulary-parallel rank holds whole
tiles; the tiles' log-sum-exps are gathered and combined in one fixed order, so ranks are just more
tiles and [T, V] need not exist. The backward pass recomputes the logits (as Liger-Kernel,
arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009, do). Entropies, and the divergence from a
teacher whose head is given (`divergence.py`), are functions of the same tiles, and so are their
gradients. On CUDA each pass over the logits is a kernel of `triton_scores`, specified by the plain
functions here. Of a truncated distribution, all of them are those of the logits that are left when
the others are masked (`token_sets.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.model.divergence import HeadInputs, combine_divergence, tile_divergence
from mesh.model.tile_gradient import DivergenceTerm, EntropyTerm, tile_gradient
from mesh.model.tiles import combine_scores, gather_tiles, shard_of, tile_scores
from mesh.model.token_sets import Mask, TokenSets
from mesh.model.vocabulary import MASKED, mask_ids, vocab_products
from mesh.types import IdSpans


class TokenScores(NamedTuple):
    """logprobs_A and entropy_A, both fp32 [A] and differentiable."""

    logprobs_A: torch.Tensor
    entropy_A: torch.Tensor


class TaughtScores(NamedTuple):
    """Scores beside a teacher: divergence_A is KL(policy || teacher) over the whole vocabulary, at
    every token; all fp32 [A] and differentiable.
    """

    logprobs_A: torch.Tensor
    entropy_A: torch.Tensor
    divergence_A: torch.Tensor


def score_tiles(
    pieces: Iterable[tuple[Sequence[int], torch.Tensor]],
    targets_A: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    with_entropy: bool,
) -> tuple[torch.Tensor, ...]:
    """(logprobs_A, entropy_A, logsumexp_A) from this shard's tiles, in vocabulary order.

    pieces: (edges, logits) of one or more adjacent tiles, the logits as the matmul returns them;
    targets_A: ids relative to the shard's start, other shards' too. Entropy is 0 unless
    `with_entropy`.
    """
    scores = [
        tile_scores(logits, edges, targets_A, temperature, with_entropy) for edges, logits in pieces
    ]
    return combine_scores(gather_tiles(_joined(scores), group), with_entropy)


def piece_logits(
    hidden_AD: torch.Tensor,
    weight: torch.Tensor,
    edges: Sequence[int],
    first: int,
    textless: IdSpans,
) -> torch.Tensor:
    """Logits of rows edges[0] to edges[-1] of this rank's `weight`, whose first row is id `first`;
    those of `textless` ids are masked.
    """
    logits_AV = F.linear(hidden_AD, weight[edges[0] : edges[-1]])
    mask_ids(logits_AV, textless, first + edges[0])
    return logits_AV


@dataclass(frozen=True)
class _Head:
    """What a head's scores are taken over. Targets are relative to the shard's first id. mask: of
    the ids outside of truncated sets; None: nothing is truncated."""

    temperature: float
    group: dist.ProcessGroup | None
    textless: IdSpans
    num_shards: int
    first: int
    mask: Mask | None = None

    def whole_logits(self, inputs: HeadInputs, edges: Sequence[int]) -> torch.Tensor:
        return piece_logits(*inputs, edges, self.first, self.textless)

    def logits(self, inputs: HeadInputs, edges: Sequence[int]) -> torch.Tensor:
        logits_AV = self.whole_logits(inputs, edges)
        if self.mask is not None:
            self.mask(logits_AV, edges[0])
        return logits_AV

    def teacher_logits(
        self, teacher: HeadInputs, edges: Sequence[int], logits_AV: torch.Tensor
    ) -> torch.Tensor:
        """A teacher's logits, over the same sets; logits_AV: the policy's `logits`."""
        theirs_AV = self.whole_logits(teacher, edges)
        if self.mask is not None:
            theirs_AV.masked_fill_(logits_AV < MASKED / 2, MASKED)
        return theirs_AV

    def truncated(self, inputs: HeadInputs, sets: TokenSets) -> _Head:
        """The head over the sets of these rows. Collective of the group."""

        def logits_of(rows: slice) -> torch.Tensor:
            part = HeadInputs(inputs.hidden_AD[rows], inputs.weight)
            pieces = vocab_products(len(inputs.weight), self.num_shards)
            logits = [self.whole_logits(part, edges) for edges in pieces]
            return logits[0] if len(logits) == 1 else torch.cat(logits, -1)

        vocab = len(inputs.weight) * self.num_shards
        mask = sets.mask(logits_of, len(inputs.hidden_AD), vocab, self.first, self.group)
        return replace(self, mask=mask)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_AD: torch.Tensor,
        weight: torch.Tensor,
        targets_A: torch.Tensor,
        head: _Head,
        teacher: HeadInputs | None,
    ) -> tuple[torch.Tensor, ...]:
        scores, taught = [], []
        for edges in vocab_products(len(weight), head.num_shards):
            logits = head.logits(HeadInputs(hidden_AD, weight), edges)
            scores.append(tile_scores(logits, edges, targets_A, head.temperature, True))
            if teacher is not None:
                theirs = head.teacher_logits(teacher, edges, logits)
                taught.append(tile_divergence(logits, theirs, edges, head.temperature))
        scores_K3A = gather_tiles(_joined(scores), head.group)
        logprobs_A, entropy_A, logsumexp_A = combine_scores(scores_K3A, with_entropy=True)
        outs, saved = [logprobs_A, entropy_A], [hidden_AD, weight, targets_A, logsumexp_A]
        if teacher is not None:
            taught_K2A = gather_tiles(_joined(taught), head.group)
            found = combine_divergence(scores_K3A[:, 0], taught_K2A, logsumexp_A)
            outs.append(found[0])
            saved += [*teacher, *found]
        ctx.save_for_backward(*saved, entropy_A)
        ctx.head = head
        ctx.set_materialize_grads(False)  # an entropy that is not used has no gradient to compute
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        hidden_AD, weight, targets_A, logsumexp_A, *taught, entropy_A = ctx.saved_tensors
        head: _Head = ctx.head
        grad_A, entropy_grad_A, divergence_grad_A = (*grads, None)[:3]
        if grad_A is None:
            grad_A = torch.zeros_like(logsumexp_A)
        scale_A = grad_A / head.temperature
        entropy = divergence = None
        if entropy_grad_A is not None:
            entropy = EntropyTerm(entropy_A, entropy_grad_A / head.temperature)
        grad_hidden_AD = torch.zeros_like(hidden_AD, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for edges in vocab_products(len(weight), head.num_shards):
            first, last = edges[0], edges[-1]
            logits = head.logits(HeadInputs(hidden_AD, weight), edges)
            if divergence_grad_A is not None:
                *inputs, divergence_A, teacher_A = taught
                theirs = head.teacher_logits(HeadInputs(*inputs), edges, logits)
                divergence = DivergenceTerm(
                    theirs, teacher_A, divergence_A, divergence_grad_A / head.temperature
                )
            grad = tile_gradient(
                logits,
                first,
                targets_A,
                logsumexp_A,
                scale_A,
                head.temperature,
                entropy,
                divergence,
            )
            grad_hidden_AD += grad @ weight[first:last]
            grad_weight[first:last] = grad.t() @ hidden_AD
        if head.group is not None:
            dist.all_reduce(grad_hidden_AD, group=head.group)
        return grad_hidden_AD.to(hidden_AD.dtype), grad_weight, None, None, None


def _joined(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(list(tiles))


def token_logprobs(
    hidden_AD: torch.Tensor,
    weight: torch.Tensor,
    targets_A: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None = None,
    textless: IdSpans = (),
    sets: TokenSets | None = None,
) -> TokenScores:
    """Logprob of every target token and the entropy of its distribution.

    hidden_AD: hidden states that predict the targets, replicated over `group`; weight: this rank's
    vocabulary shard [V / shards, D]; targets_A: global token ids. `temperature` divides the
    logits. Ids of `textless` have probability exactly 0, and their rows gradient exactly 0.

    sets: of the truncated distribution that is scored, whose gradient is that for these sets as
    they are; ids outside have probability and gradient 0, and as a target the logprob -inf.
    """
    inputs = HeadInputs(hidden_AD, weight)
    return TokenScores(*_scores(inputs, targets_A, temperature, group, textless, None, sets))


def taught_logprobs(
    hidden_AD: torch.Tensor,
    weight: torch.Tensor,
    targets_A: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    textless: IdSpans,
    teacher: HeadInputs,
    sets: TokenSets | None = None,
) -> TaughtScores:
    """`token_logprobs`, and the divergence from a teacher, whose weight is the same shard. With
    `sets` both distributions are over them."""
    assert len(teacher.weight) == len(weight), "the teacher's head has another vocabulary"
    inputs = HeadInputs(hidden_AD, weight)
    return TaughtScores(*_scores(inputs, targets_A, temperature, group, textless, teacher, sets))


def _scores(
    inputs: HeadInputs,
    targets_A: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    textless: IdSpans,
    teacher: HeadInputs | None,
    sets: TokenSets | None,
) -> tuple[torch.Tensor, ...]:
    shard, num_shards = shard_of(group)
    first = shard * len(inputs.weight)
    head = _Head(temperature, group, textless, num_shards, first)
    if sets is None:
        return _TokenLogprobs.apply(*inputs, targets_A - first, head, teacher)
    with torch.no_grad():
        head = head.truncated(inputs, sets)
    logprobs_A, *others = _TokenLogprobs.apply(*inputs, targets_A - first, head, teacher)
    impossible_A = logprobs_A < MASKED / temperature / 2
    return logprobs_A.masked_fill(impossible_A, -torch.inf), *others
