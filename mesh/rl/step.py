"""From a wave of scored rollouts to what one trainer rank trains on: pure, the same on any mesh.

Every rank derives advantages, which groups count, and all ranks' passes from the outlines of all
rollouts; only its own leaves hold tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from typing import TypeVar

import torch

from mesh.rl.advantages import equal_groups, lengths_of, rewards_of
from mesh.rl.cutting import leaf_tokens, minibatches, schedule
from mesh.rl.objective import Objective
from mesh.rl.packing import Leaf, assert_complete, leaves
from mesh.rl.rewards import shaped_rewards
from mesh.types import TRUNCATED, NumberedPrompt, Outline, Rollout, RolloutKey, Wave

T = TypeVar("T")

Advantages = Mapping[int, Sequence[float]]
"""By prompt_id, one for each of its samples."""

Pass = list[Leaf]
"""Leaves that share a forward pass; none: an empty pass, which keeps collectives aligned."""


@dataclass(frozen=True)
class StepSettings:
    """Sizes of a step, and what counts. pass_tokens: most tokens of a forward pass; a group of more
    is cut into pieces. mask_truncated: truncated rollouts stay out of the loss, but not out of
    their group's statistics; truncated_reward: theirs, in place of their score. log_tokens: samples
    have token ids and numbers. updates: of a step, each on a minibatch of groups, cut by `seed`;
    kl_stop: bound of the KL from which on the step makes no more of them. refill_rounds: most
    rounds in which groups that are equal in `refill_on` are replaced. log_samples: rollouts of a
    step that are kept (`mesh/rl/samples.py`).
    """

    num_prompts: int
    group_size: int
    waves: int
    drop_equal_groups: bool
    pass_tokens: int
    mask_truncated: bool = False
    truncated_reward: float | None = None
    log_tokens: bool = False
    updates: int = 1
    kl_stop: float = inf
    seed: int = 0
    refill_rounds: int = 0
    refill_on: str = "reward"
    log_samples: int = 0


@dataclass(frozen=True)
class Minibatch:
    """The work of one update on one wave: this rank's passes, of which every rank has the same
    number, and what the whole minibatch counts.

    tokens, sequences: loss tokens and rollouts that enter the loss, over all ranks.
    """

    passes: list[Pass]
    tokens: int
    sequences: int


@dataclass(frozen=True)
class Share:
    """A wave's work: a minibatch for each update of the step."""

    minibatches: list[Minibatch]

    @property
    def passes(self) -> list[Pass]:
        """This rank's passes of all minibatches, in order."""
        return [one for minibatch in self.minibatches for one in minibatch.passes]

    @property
    def tokens(self) -> int:
        """Loss tokens of the wave, over all ranks."""
        return sum(minibatch.tokens for minibatch in self.minibatches)

    @property
    def sequences(self) -> int:
        """Rollouts of the wave that enter the loss, over all ranks."""
        return sum(minibatch.sequences for minibatch in self.minibatches)

    @property
    def rollouts(self) -> list[Rollout]:
        """This rank's rollouts, in the order in which they are packed."""
        return [r for one in self.passes for leaf in one for r in leaf.rollouts]


@dataclass(frozen=True)
class ScoredWave:
    """A wave before the step's first update, as its inspector sees it.

    prompts: all that were answered for it, also those whose groups were replaced; generated:
    rollouts that this rank's replica made of them; logprobs_A: the trainer's, of the loss tokens of
    `share.rollouts`, in order.
    """

    step: int
    prompts: Sequence[NumberedPrompt]
    generated: list[Rollout]
    wave: Wave
    share: Share
    logprobs_A: torch.Tensor


def share_of(wave: Wave, keys: StepSettings, num_ranks: int, rank: int | None, step: int) -> Share:
    """The work of data-parallel `rank` of `num_ranks` on a wave of a step, cut into minibatches and
    passes, before anything is known of advantages; rank None, off the trainer: nothing.
    """
    if not wave.outlines or rank is None:
        return Share([Minibatch([], 0, 0)] * keys.updates)
    parts = minibatches(prompt_ids_of(wave, keys.group_size), keys.updates, keys.seed, step)
    return Share([_minibatch(part_of(wave, ids), keys, num_ranks, rank) for ids in parts])


def part_of(wave: Wave, prompt_ids: set[int]) -> Wave:
    """What a wave has of these prompts."""
    return Wave(
        [o for o in wave.outlines if o.prompt_id in prompt_ids],
        [r for r in wave.rollouts if r.prompt_id in prompt_ids],
    )


def _minibatch(wave: Wave, keys: StepSettings, num_ranks: int, rank: int) -> Minibatch:
    outlines = counted(wave, keys)
    mine = _leaves(wave, {o.key for o in outlines}, keys)
    counts = leaf_tokens(outlines, num_ranks, keys.pass_tokens)
    assert [leaf.num_tokens for leaf in mine] == counts[rank], "leaves are not the schedule's"
    return Minibatch(
        passes_of(mine, counts, rank, keys.pass_tokens),
        sum(o.length for o in outlines),
        len(outlines),
    )


def counted(wave: Wave, step: StepSettings) -> list[Outline]:
    """The rollouts of a wave that enter the loss and its normaliser: all but groups of equal
    rewards and truncated rollouts, where these are left out.
    """
    dropped_P = equal_groups(rewards_of(wave, step.group_size)) & step.drop_equal_groups
    pairs = zip(prompt_ids_of(wave, step.group_size), dropped_P.tolist(), strict=True)
    kept = {prompt_id for prompt_id, drop in pairs if not drop}
    masked = TRUNCATED if step.mask_truncated else frozenset()
    return [o for o in wave.outlines if o.prompt_id in kept and o.finish_reason not in masked]


def credited(share: Share, advantages: Advantages, objective: Objective) -> Share:
    """The share with the advantages of its rollouts, and the weights of their tokens."""
    return Share([
        replace(minibatch, passes=[
            [_credited(leaf, advantages, objective) for leaf in one] for one in minibatch.passes
        ])
        for minibatch in share.minibatches
    ])  # fmt: skip


def with_scores(share: Share, scores: Sequence[T]) -> list[tuple[Minibatch, list[T]]]:
    """Each minibatch with the scores of its passes; scores: of `share.passes`, in order."""
    left = iter(scores)
    pairs = [(one, list(islice(left, len(one.passes)))) for one in share.minibatches]
    assert sum(len(found) for _, found in pairs) == len(scores), "scores of other passes"
    return pairs


def _credited(leaf: Leaf, advantages: Advantages, objective: Objective) -> Leaf:
    group, lengths_R = advantages[leaf.prompt_id], torch.tensor([r.length for r in leaf.rollouts])
    advantages_R = torch.tensor([group[r.sample_id] for r in leaf.rollouts])
    weights_R = objective.weights(lengths_R)
    return replace(leaf, advantages=tuple(advantages_R.tolist()), weights=tuple(weights_R.tolist()))


def passes_of(
    mine: Sequence[Leaf], token_counts: Sequence[Sequence[int]], rank: int, max_tokens: int
) -> list[Pass]:
    """The passes of a rank with leaves `mine`; token_counts: tokens of every rank's leaves."""
    planned = schedule(token_counts, max_tokens)[rank]
    return [[mine[i] for i in indices] for indices in planned]


def prompt_ids_of(wave: Wave, group_size: int) -> list[int]:
    """The prompts of a wave, in the order of its outlines."""
    return [o.prompt_id for o in wave.outlines[::group_size]]


def advantages_of(
    wave: Wave,
    objective: Objective,
    group_size: int,
    divergences: Mapping[RolloutKey, float] | None = None,
) -> dict[int, list[float]]:
    """The advantages of each prompt's samples, by prompt_id; none off the trainer.

    divergences: weighted KL of each rollout to the reference, where rewards are less by it.
    """
    if not wave.outlines:
        return {}
    rewards_PG = shaped_rewards(wave, group_size, objective.length_penalty, divergences)
    advantages_PG = objective.advantages(rewards_PG, lengths_of(wave, group_size))
    return dict(zip(prompt_ids_of(wave, group_size), advantages_PG.tolist(), strict=True))


def _leaves(wave: Wave, kept: set[RolloutKey], step: StepSettings) -> list[Leaf]:
    owned = {r.prompt_id for r in wave.rollouts}
    assert_complete((r.key for r in wave.rollouts), owned, step.group_size)
    rollouts = [r for r in wave.rollouts if r.key in kept]
    zeros_R = torch.zeros(len(rollouts))
    return leaves(rollouts, zeros_R, zeros_R, step.pass_tokens)


def waves_of(prompts: Sequence[NumberedPrompt], num_waves: int) -> list[Sequence[NumberedPrompt]]:
    """A step's prompts cut into equal waves, in order."""
    size = len(prompts) // num_waves
    assert size * num_waves == len(prompts), "prompts do not divide by waves"
    return [prompts[i * size : (i + 1) * size] for i in range(num_waves)]


def batch_of(
    prompts: Sequence[NumberedPrompt], prompt_id: int, num_prompts: int
) -> list[NumberedPrompt]:
    """The prompts of a wave that were answered together with `prompt_id`: those of its round."""
    round = prompt_id // num_prompts
    return [p for p in prompts if p.prompt_id // num_prompts == round]
