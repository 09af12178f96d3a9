"""L1 on the trainer: a sequence's logprobs do not depend on what is packed with it.

Every data-parallel rank scores its own sequences, as in training, and all of them run the same
number of forward passes: FSDP gathers weights in each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule

from mesh.exactness.batch import Walk
from mesh.exactness.bits import Key, Rollouts, compare_rollouts
from mesh.exactness.naming import Tracer, settle
from mesh.exactness.table import Check
from mesh.exactness.trace import Trace, trace_training
from mesh.rl.packing import Leaf, microbatches, owner, pack
from mesh.roles.trainer import Trainer
from mesh.types import Rollout

Rows = list[list[Rollout]]
"""One rank's sequences, by the forward pass that packs them."""

Arrange = Callable[[list[Rollout], int], Rows]
"""From one rank's sequences, and the most tokens of a forward pass, to its forward passes."""


def packed(rollouts: Sequence[Rollout], limit: int) -> Rows:
    """In order, at most `limit` tokens a pass."""
    sizes = [len(r.prompt_tokens) + len(r.tokens) for r in rollouts]
    return [[rollouts[i] for i in row] for row in microbatches(sizes, limit)]


def _alone(rollouts: list[Rollout], limit: int) -> Rows:
    return [[rollout] for rollout in rollouts]


def _reversed(rollouts: list[Rollout], limit: int) -> Rows:
    return packed(rollouts[::-1], limit)


def _parts(rollouts: list[Rollout], limit: int) -> Rows:
    tokens = sum(len(r.prompt_tokens) + len(r.tokens) for r in rollouts)
    return packed(rollouts, min(limit, tokens) // 5)


def _shuffled(rollouts: list[Rollout], limit: int) -> Rows:
    tokens = sum(len(r.prompt_tokens) + len(r.tokens) for r in rollouts)
    return packed(random.Random(0).sample(rollouts, len(rollouts)), min(limit, tokens) // 3)


WAYS: dict[str, Arrange] = {
    "trainer, each sequence alone": _alone,
    "trainer, reversed order": _reversed,
    "trainer, a fifth of the tokens a pass": _parts,
    "trainer, random neighbours": _shuffled,
}


def leaves_of(rows: Rows) -> list[Leaf]:
    """One leaf a forward pass; scoring asks for neither advantages nor weights."""
    zeros = [(0.0,) * len(row) for row in rows]
    return [
        Leaf(0, piece, tuple(row), zero, zero)
        for piece, (row, zero) in enumerate(zip(rows, zeros, strict=True))
    ]


@contextmanager
def scoring(trainer: Trainer, temperature: float, most_tokens: int) -> Iterator[None]:
    """Let the trainer score at this temperature, with so many tokens a pass (0: a leaf a pass).

    FSDP keeps some weights gathered until a backward pass, which does not come here: afterwards
    they are in shards again.
    """
    before = trainer.conf
    trainer.conf = deepcopy(before)
    trainer.conf.generator.temperature = temperature
    trainer.conf.trainer.microbatch_tokens = most_tokens
    try:
        yield
    finally:
        trainer.conf = before
        for module in trainer.model.modules() if trainer.model is not None else ():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def score(
    trainer: Trainer, leaves: Sequence[Leaf], token_counts: Sequence[Sequence[int]]
) -> dict[Key, Rollout]:
    """This rank's rollouts with the trainer's logprobs, by the forward pass alone. Collective."""
    if trainer.model is None:
        return {}
    batches = (
        pack(leaves).to(trainer.device) for leaves in trainer.microbatches(leaves, token_counts)
    )
    logprobs = [trainer.score(trainer.model, batch).logprobs_A for batch in batches]
    return scored(leaves, torch.cat(logprobs) if logprobs else torch.zeros(0))


def scored(leaves: Sequence[Leaf], logprobs_A: torch.Tensor) -> dict[Key, Rollout]:
    """The leaves' rollouts with these logprobs, which are in their order."""
    rollouts = [rollout for leaf in leaves for rollout in leaf.rollouts]
    parts = logprobs_A.cpu().split([len(rollout.tokens) for rollout in rollouts])
    return {
        (r.prompt_id, r.sample_id): replace(r, logprobs=tuple(part.tolist()))
        for r, part in zip(rollouts, parts, strict=True)
    }


def arranged(
    trainer: Trainer, rollouts: Rollouts, arrange: Arrange, limit: int
) -> tuple[list[Leaf], list[list[int]]]:
    """(this rank's leaves, the token counts of every data-parallel rank's): one leaf a pass."""
    by_rank = [
        leaves_of(
            arrange([r for r in rollouts.values() if owner(r.prompt_id, trainer.dp) == d], limit)
        )
        for d in range(trainer.dp)
    ]
    counts = [[leaf.num_tokens for leaf in leaves] for leaves in by_rank]
    return ([] if trainer.dp_rank is None else by_rank[trainer.dp_rank]), counts


def score_arranged(
    trainer: Trainer, rollouts: Rollouts, temperature: float, arrange: Arrange = packed
) -> dict[Key, Rollout]:
    """This rank's share of the rollouts with the trainer's logprobs. Collective of the trainer."""
    leaves, counts = arranged(trainer, rollouts, arrange, trainer.conf.trainer.microbatch_tokens)
    with scoring(trainer, temperature, 0):
        return score(trainer, leaves, counts)


def tracer(
    trainer: Trainer, rollouts: Rollouts, temperature: float, arrange: Arrange = packed
) -> Tracer:
    """Scores the rollouts again in this arrangement and traces one of them."""

    def trace(key: Key) -> Trace:
        limit = trainer.conf.trainer.microbatch_tokens
        leaves, counts = arranged(trainer, rollouts, arrange, limit)
        with scoring(trainer, temperature, 0):
            return trace_training(trainer, leaves, counts, key)

    return trace


def trainer_checks(
    walk: Walk, trainer: Trainer, rollouts: Rollouts, temperature: float
) -> Iterator[Check]:
    """The rows of L1 on the trainer, each against all sequences packed in order. Collective.

    rollouts: the whole batch, on every rank.
    """
    base = score_arranged(trainer, rollouts, temperature)
    for what, arrange in WAYS.items():
        found = score_arranged(trainer, rollouts, temperature, arrange)
        one, other = (tracer(trainer, rollouts, temperature, way) for way in (arrange, packed))
        yield Check("L1", what, settle(walk, compare_rollouts(found, base), one, other))
