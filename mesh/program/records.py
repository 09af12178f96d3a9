"""What a step leaves behind: its metrics, the rollouts of it that are kept, and all its rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mesh.lifecycle.process import Process
from mesh.model.logprobs import TokenScores
from mesh.program.assembly import Program
from mesh.program.groups import Groups
from mesh.rl.samples import Record, StepRecord, chosen_groups, place_of, record_of
from mesh.rl.step import Advantages, StepSettings
from mesh.types import Rollout, RolloutKey

Numbers = dict[str, list[float]]


@dataclass(frozen=True)
class Trained:
    """This rank's rollouts of a wave that enter the loss, in the order in which they are packed,
    and the trainer's scores of their loss tokens under the weights that drew them."""

    rollouts: Sequence[Rollout]
    scores: TokenScores


def step_record(
    program: Program,
    step: int,
    metrics: dict[str, Any],
    groups: Groups,
    advantages: Advantages,
    trained: Sequence[Trained],
) -> StepRecord:
    """The record of a step. groups: of all its waves."""
    outlines = groups.drawn.outlines
    histograms = {
        "reward": [one.reward for one in outlines],
        "response_length": [float(one.length) for one in outlines],
    }
    samples: list[Record] = []
    if program.trainer.speaks:
        samples = samples_of(program.plan.step, step, groups, advantages, trained)
    return StepRecord(metrics, samples, histograms if outlines else {})


def samples_of(
    keys: StepSettings,
    step: int,
    groups: Groups,
    advantages: Advantages,
    trained: Sequence[Trained],
) -> list[Record]:
    """The rollouts that are kept of those that this rank owns. Groups that were left out have no
    advantages, and what is not trained on has no numbers of the trainer."""
    size, seed, left_out = keys.group_size, keys.seed, groups.left_out
    why = chosen_groups(groups.drawn.outlines, size, keys.log_samples, seed, step)
    numbers = dict(numbers_of(trained, why)) if keys.log_tokens else {}
    prompts = {p.prompt_id: p for p in groups.prompts if p.prompt_id in why}
    return [
        {
            "split": "train",
            "set": "",
            "chosen": why[r.prompt_id],
            **record_of(prompts[r.prompt_id], r, numbers.get(r.key, {})),
            "advantage": 0.0 if r.prompt_id in left_out else advantages[r.prompt_id][r.sample_id],
            **({"left_out": left_out[r.prompt_id]} if r.prompt_id in left_out else {}),
        }
        for r in groups.drawn.rollouts
        if r.prompt_id in why
    ]


def numbers_of(
    trained: Sequence[Trained], prompt_ids: Mapping[int, str]
) -> Iterator[tuple[RolloutKey, Numbers]]:
    """By rollout of these prompts, what the trainer knows of its loss tokens: the differences of
    its logprobs from the generator's, and the entropies of its distributions."""
    for one in trained:
        lengths = [r.length for r in one.rollouts]
        columns = (column.cpu().split(lengths) for column in one.scores)
        for r, logprobs_A, entropy_A in zip(one.rollouts, *columns, strict=True):
            if r.prompt_id in prompt_ids:
                differences_A = logprobs_A - torch.tensor(r.logprobs, dtype=logprobs_A.dtype)
                yield (
                    r.key,
                    {
                        "logprob_diffs": differences_A.tolist(),
                        "entropies": entropy_A.tolist(),
                    },
                )


def together(process: Process, step: int, mine: Sequence[Record]) -> list[Record]:
    """All ranks' records of a step, on rank 0, in the order in which they are kept; none elsewhere.
    Collective."""
    found = [record for share in process.to_rank0(list(mine)) for record in share]
    return sorted(found, key=lambda record: place_of(record, step))
