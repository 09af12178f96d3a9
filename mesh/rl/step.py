"""From a wave of scored rollouts to what one trainer rank trains on: pure, the same on any mesh.

Every rank derives advantages, which groups count, and all ranks' schedules from the outlines of all
rollouts; only its own leaves hold tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from mesh.rl.advantages import Advantage, equal_groups, group_advantages
from mesh.rl.losses import Aggregation, token_weights
from mesh.rl.packing import Leaf, assert_complete, leaves, microbatches, owner
from mesh.types import Outline, Prompt, Wave


@dataclass(frozen=True)
class Rules:
    """How rollouts become losses. leaf_tokens: groups of more tokens are cut into pieces."""

    group_size: int
    advantage: Advantage
    aggregation: Aggregation
    drop_equal_groups: bool
    leaf_tokens: int


@dataclass(frozen=True)
class Share:
    """A wave's work: this rank's leaves, all ranks' token counts, and what the whole wave counts.

    tokens, sequences: response tokens and rollouts that enter the loss, over all ranks.
    """

    leaves: list[Leaf]
    token_counts: list[list[int]]
    tokens: int
    sequences: int


def share_of(wave: Wave, rules: Rules, num_ranks: int) -> Share:
    """What a trainer's data-parallel rank trains on of `wave`; nothing off the trainer."""
    if not wave.outlines:
        return Share([], [[] for _ in range(num_ranks)], 0, 0)
    rewards_PG = wave.rewards(rules.group_size)
    keep_P = (
        ~equal_groups(rewards_PG) if rules.drop_equal_groups else torch.ones(len(rewards_PG)) > 0
    )
    advantages = advantages_of(wave, rules)
    kept = {i for i, keep in zip(advantages, keep_P.tolist(), strict=True) if keep}
    outlines = [o for o in wave.outlines if o.prompt_id in kept]
    return Share(
        _leaves(wave, kept, advantages, rules),
        _token_counts(outlines, num_ranks, rules.leaf_tokens),
        sum(o.response_length for o in outlines),
        len(outlines),
    )


def advantages_of(wave: Wave, rules: Rules) -> dict[int, list[float]]:
    """The advantages of each prompt's samples, by prompt_id, in the order of the outlines."""
    prompt_ids = [o.prompt_id for o in wave.outlines[:: rules.group_size]]
    advantages_PG = group_advantages(wave.rewards(rules.group_size), rules.advantage)
    return dict(zip(prompt_ids, advantages_PG.tolist(), strict=True))


def _leaves(
    wave: Wave, kept: set[int], advantages: dict[int, list[float]], rules: Rules
) -> list[Leaf]:
    owned = {r.prompt_id for r in wave.rollouts}
    assert_complete(((r.prompt_id, r.sample_id) for r in wave.rollouts), owned, rules.group_size)
    rollouts = [r for r in wave.rollouts if r.prompt_id in kept]
    if not rollouts:
        return []
    lengths_R = torch.tensor([len(r.tokens) for r in rollouts])
    advantages_R = torch.tensor([advantages[r.prompt_id][r.sample_id] for r in rollouts])
    weights_R = token_weights(lengths_R, rules.aggregation)
    return leaves(rollouts, advantages_R, weights_R, rules.leaf_tokens)


def _token_counts(outlines: Sequence[Outline], num_ranks: int, leaf_tokens: int) -> list[list[int]]:
    """Tokens of every leaf of every rank, as `leaves` will cut them."""
    counts: list[list[int]] = [[] for _ in range(num_ranks)]
    for prompt_id, group in groupby(outlines, key=lambda o: o.prompt_id):
        sizes = [o.prompt_length + o.response_length for o in group]
        pieces = microbatches(sizes, leaf_tokens)
        counts[owner(prompt_id, num_ranks)] += [sum(sizes[i] for i in piece) for piece in pieces]
    return counts


def waves_of(prompts: Sequence[Prompt], num_waves: int) -> list[Sequence[Prompt]]:
    """A step's prompts cut into equal waves, in order."""
    size = len(prompts) // num_waves
    assert size * num_waves == len(prompts), "prompts do not divide by waves"
    return [prompts[i * size : (i + 1) * size] for i in range(num_waves)]


def rollout_metrics(waves: Sequence[Wave], group_size: int) -> dict[str, float]:
    """What the rollouts of a whole step look like; empty off the trainer."""
    outlines = [o for wave in waves for o in wave.outlines]
    if not outlines:
        return {}
    rewards_PG = torch.cat([wave.rewards(group_size) for wave in waves]).double()
    lengths = [o.response_length for o in outlines]
    truncated = sum(o.finish_reason == "length" for o in outlines)
    return {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std()),
        "equal_groups": float(equal_groups(rewards_PG).double().mean()),
        "tokens/generated": float(sum(lengths)),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": float(max(lengths)),
        "truncated": truncated / len(outlines),
    }


def samples_of(
    prompts: Sequence[Prompt],
    waves: Sequence[Wave],
    rules: Rules,
    decode: Callable[[tuple[int, ...]], str],
) -> list[dict[str, Any]]:
    """What a person reads of a step: this rank's rollouts as text, and what they are worth."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return [
        {
            "prompt_id": r.prompt_id,
            "sample_id": r.sample_id,
            "prompt": by_id[r.prompt_id].text,
            "response": decode(r.tokens),
            "answer": by_id[r.prompt_id].answer,
            "reward": r.reward,
            "advantage": advantages[r.prompt_id][r.sample_id],
            "finish_reason": r.finish_reason,
        }
        for wave in waves
        for advantages in [advantages_of(wave, rules)]
        for r in wave.rollouts
    ]
