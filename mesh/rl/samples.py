"""What of a step is written down: whole groups, the best one, the worst one and others by chance.

The choice follows from the outlines of the step, the run's seed and the step: no mesh changes it.
It comes before anything is made of the rollouts, so that only what is kept costs something.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import fsum
from types import MappingProxyType
from typing import Any

from mesh.types import NumberedPrompt, Outline, Rollout

BEST, WORST, RANDOM, ALL, FIXED = "best", "worst", "random", "all", "fixed"
"""Why a group is kept: its mean reward, chance, as all are, or (of an evaluation) the same prompts
every time."""

Record = dict[str, Any]
"""A rollout that is kept, as JSON without the texts of its tokens; `mesh/runs/sample_rows.py` makes
the line of it. Its `turns` are pairs: number of tokens, true if they were sampled."""

Columns = Mapping[str, Sequence[float]]
"""Numbers of a rollout's loss tokens, by their name in a record."""


@dataclass(frozen=True)
class StepRecord:
    """What a step, or an evaluation, leaves behind to be logged.

    samples: this rank's rollouts of those that are kept; histograms: values of all rollouts of the
    step, by name, on the trainer's ranks.
    """

    metrics: dict[str, Any]
    samples: list[Record] = field(default_factory=list)
    histograms: dict[str, list[float]] = field(default_factory=dict)

    def __add__(self, other: StepRecord) -> StepRecord:
        """A step with its evaluation."""
        return StepRecord(
            self.metrics | other.metrics,
            self.samples + other.samples,
            self.histograms | other.histograms,
        )


def chosen_groups(
    outlines: Sequence[Outline], group_size: int, most: int, seed: int, step: int
) -> dict[int, str]:
    """The prompts whose groups are kept, and why: `most` rollouts in whole groups, at least one
    group; -1: all of them, 0: none.

    The group of the best mean reward, that of the worst, then random ones. Chance, and which of
    equal groups it is, are hashes of seed, step and prompt.
    """
    means = {
        prompt_id: fsum(one.reward for one in group) / group_size
        for prompt_id, group in groupby(outlines, key=lambda one: one.prompt_id)
    }
    if most <= 0 or not means:
        return dict.fromkeys(means, ALL) if most < 0 else {}
    order = sorted(means, key=lambda prompt_id: hashed(seed, step, prompt_id))
    found = {max(order, key=lambda prompt_id: means[prompt_id]): BEST}
    rest = [prompt_id for prompt_id in order if prompt_id not in found]
    if rest:
        worst = min(rest, key=lambda prompt_id: means[prompt_id])
        found |= {worst: WORST}
        found |= {prompt_id: RANDOM for prompt_id in rest if prompt_id != worst}
    return dict(list(found.items())[: max(1, most // group_size)])


def place_of(record: Record, seed: int, step: int) -> tuple[int, str, int, int, int]:
    """The place of a record among those of its step: the best group, the worst one, and random ones
    in the order in which they were drawn, as what comes last may be left out of the file; then
    evaluation sets by name."""
    order = (BEST, WORST, RANDOM, ALL, FIXED).index(record["chosen"])
    prompt_id, sample_id = record["prompt_id"], record["sample_id"]
    chance = hashed(seed, step, prompt_id) if record["chosen"] == RANDOM else 0
    return order, record["set"], chance, prompt_id, sample_id


def fixed_prompts(num_prompts: int, num_samples: int, most: int, seed: int) -> frozenset[int]:
    """The held-out prompts whose answers are kept at every evaluation of a set: `most` samples in
    whole groups, at least one prompt; -1: all, 0: none."""
    order = sorted(range(num_prompts), key=lambda index: hashed(seed, "eval", index))
    return frozenset(order if most < 0 else order[: max(1, most // num_samples) if most else 0])


def hashed(*counter: int | str) -> int:
    """A hash of 64 bits."""
    text = "/".join(map(str, counter))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def record_of(
    numbered: NumberedPrompt, rollout: Rollout, columns: Columns = MappingProxyType({})
) -> Record:
    """What a record has of any rollout. `task_prompt_id`: the id that the task gave, where that is
    not the prompt's place; columns: what is known of its loss tokens beside `logprobs`."""
    prompt, r = numbered.prompt, rollout
    own = prompt.prompt_id != numbered.prompt_id
    return {
        "prompt_id": r.prompt_id,
        "sample_id": r.sample_id,
        "prompt": prompt.question,
        **({"messages": [dict(one) for one in prompt.messages]} if prompt.messages else {}),
        "answer": prompt.answer,
        "reward": r.reward,
        **({"parts": dict(r.parts)} if r.parts else {}),
        **({} if r.correct is None else {"correct": r.correct}),
        "finish_reason": r.finish_reason,
        **({"task_prompt_id": int(prompt.prompt_id)} if own else {}),
        "length": r.length,
        "prompt_tokens": list(r.prompt_tokens),
        "tokens": list(r.tokens),
        **({"turns": [[t.num_tokens, t.sampled] for t in r.turns]} if r.turns else {}),
        "logprobs": list(r.logprobs),
        **{name: list(column) for name, column in columns.items()},
    }
