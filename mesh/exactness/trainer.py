"""L1 on the trainer: a sequence's logprobs do not depend on what is packed with it.

Every data-parallel rank scores its own sequences, as in training, and all of them run the same
number of forward passes: FSDP gathers weights in each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule

from mesh.exactness.comparison import Rollouts, compare_rollouts
from mesh.exactness.naming import Replay, settle
from mesh.exactness.table import Check
from mesh.exactness.trace import Trace, trace_training
from mesh.exactness.walk import Walk
from mesh.rl.cutting import fill, owner
from mesh.rl.packing import Leaf, pack
from mesh.rl.step import Pass
from mesh.roles.trainer import Trainer
from mesh.types import Distribution, Rollout, RolloutKey

Rows = list[list[Rollout]]
"""One rank's sequences, by the forward pass that packs them."""

Arrange = Callable[[list[Rollout], int], Rows]
"""From one rank's sequences, and the most tokens of a forward pass, to its forward passes."""


def packed(rollouts: Sequence[Rollout], limit: int) -> Rows:
    """In order, at most `limit` tokens a pass."""
    sizes = [r.num_tokens for r in rollouts]
    return [[rollouts[i] for i in row] for row in fill(sizes, limit)]


def _alone(rollouts: list[Rollout], limit: int) -> Rows:
    return [[rollout] for rollout in rollouts]


def _reversed(rollouts: list[Rollout], limit: int) -> Rows:
    return packed(rollouts[::-1], limit)


def _parts(rollouts: list[Rollout], limit: int) -> Rows:
    tokens = sum(r.num_tokens for r in rollouts)
    return packed(rollouts, min(limit, tokens) // 5)


def _shuffled(rollouts: list[Rollout], limit: int) -> Rows:
    tokens = sum(r.num_tokens for r in rollouts)
    return packed(random.Random(0).sample(rollouts, len(rollouts)), min(limit, tokens) // 3)


ARRANGEMENTS: dict[str, Arrange] = {
    "trainer, each sequence alone": _alone,
    "trainer, reversed order": _reversed,
    "trainer, a fifth of the tokens a pass": _parts,
    "trainer, random neighbours": _shuffled,
}


def passes_of(rows: Rows) -> list[Pass]:
    """One leaf a forward pass; scoring asks for neither advantages nor weights."""
    zeros = [(0.0,) * len(row) for row in rows]
    return [
        [Leaf(0, piece, tuple(row), zero, zero)]
        for piece, (row, zero) in enumerate(zip(rows, zeros, strict=True))
    ]


@contextmanager
def resharded(trainer: Trainer) -> Iterator[None]:
    """Shard the trainer's weights again after forward passes alone: FSDP keeps some gathered until
    a backward pass, which does not come here.
    """
    try:
        yield
    finally:
        for module in trainer.model.modules() if trainer.model is not None else ():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def score(trainer: Trainer, passes: Sequence[Pass], at: Distribution) -> dict[RolloutKey, Rollout]:
    """This rank's rollouts with the trainer's logprobs, by the forward pass alone. Collective."""
    if trainer.model is None:
        return {}
    with resharded(trainer):
        batches = (pack(leaves).to(trainer.device) for leaves in passes)
        logprobs = [trainer.forward(trainer.model, batch, at).logprobs_A for batch in batches]
    rollouts = [r for leaves in passes for leaf in leaves for r in leaf.rollouts]
    return scored(rollouts, torch.cat([torch.zeros(0, device=trainer.device), *logprobs]))


def scored(rollouts: Sequence[Rollout], logprobs_A: torch.Tensor) -> dict[RolloutKey, Rollout]:
    """The rollouts with these logprobs, which are in their order."""
    parts = logprobs_A.float().cpu().split([r.length for r in rollouts])
    return {
        r.key: replace(r, logprobs=tuple(part.tolist()))
        for r, part in zip(rollouts, parts, strict=True)
    }


def arranged(trainer: Trainer, rollouts: Rollouts, arrange: Arrange, limit: int) -> list[Pass]:
    """This rank's passes over its share of the rollouts; every rank has the same number."""
    by_rank = [
        passes_of(
            arrange([r for r in rollouts.values() if owner(r.prompt_id, trainer.dp) == d], limit)
        )
        for d in range(trainer.dp)
    ]
    if trainer.dp_rank is None:
        return []
    mine = by_rank[trainer.dp_rank]
    return mine + [[] for _ in range(max(map(len, by_rank)) - len(mine))]


def score_arranged(
    walk: Walk, trainer: Trainer, rollouts: Rollouts, at: Distribution, arrange: Arrange = packed
) -> dict[RolloutKey, Rollout]:
    """This rank's share of the rollouts with the trainer's logprobs. Collective of the trainer."""
    passes = arranged(trainer, rollouts, arrange, walk.plan.step.pass_tokens)
    return score(trainer, passes, at)


def replayer(
    walk: Walk, trainer: Trainer, rollouts: Rollouts, at: Distribution, arrange: Arrange = packed
) -> Replay:
    """Scores the rollouts again in this arrangement and traces one of them."""

    def trace(key: RolloutKey) -> Trace:
        passes = arranged(trainer, rollouts, arrange, walk.plan.step.pass_tokens)
        with resharded(trainer):
            return trace_training(trainer, passes, key, at)

    return trace


def trainer_checks(
    walk: Walk, trainer: Trainer, rollouts: Rollouts, at: Distribution
) -> Iterator[Check]:
    """The rows of L1 on the trainer, each against all sequences packed in order. Collective.

    rollouts: the whole batch, on every rank.
    """
    base = score_arranged(walk, trainer, rollouts, at)
    for what, arrange in ARRANGEMENTS.items():
        found = score_arranged(walk, trainer, rollouts, at, arrange)
        one, other = (replayer(walk, trainer, rollouts, at, way) for way in (arrange, packed))
        tally = compare_rollouts(found, base)
        yield Check("L1", what, settle(walk.process, tally, one, other, walk.seek))
