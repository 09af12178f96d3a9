"""What a step leaves behind: its metrics, the rollouts of it that are kept, and all its rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mesh.lifecycle.process import Process
from mesh.model.logprobs import TokenScores
from mesh.program.assembly import Program
from mesh.program.groups import Groups
from mesh.rl.samples import Record, StepRecord, chosen_groups, place_of, record_of
from mesh.rl.step import Advantages, StepSettings
from mesh.roles.trainer import Trainer
from mesh.types import Rollout, RolloutKey

Numbers = dict[str, list[float]]
TRAINER = "trainer_logprobs"


@dataclass(frozen=True)
class Trained:
    """Rollouts that enter the loss, in the order in which they are packed, and numbers of their
    loss tokens, one after the other, by name."""

    rollouts: Sequence[Rollout]
    columns: Mapping[str, torch.Tensor]


def scored(rollouts: Sequence[Rollout], scores: TokenScores) -> Trained:
    """This rank's rollouts of a wave with the trainer's scores under the weights that drew them."""
    columns = {TRAINER: scores.logprobs_A, "entropies": scores.entropy_A}
    return Trained(rollouts, columns)


def credits_of(trainer: Trainer) -> list[Trained]:
    """The advantages of tokens that were trained on since this was last asked, where they have
    advantages of their own."""
    found, trainer.credits = trainer.credits, []
    return [Trained(rollouts, {"token_advantages": x_A}) for rollouts, x_A in found]


def step_record(
    program: Program,
    step: int,
    metrics: dict[str, Any],
    groups: Groups,
    advantages: Advantages,
    trained: Sequence[Trained],
) -> StepRecord:
    """The record of a step. groups: of all its waves."""
    trained = [*trained, *credits_of(program.trainer)]
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
    numbers = numbers_of(trained, why) if keys.log_tokens else {}
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
) -> dict[RolloutKey, Numbers]:
    """By rollout of these prompts, what is known of its loss tokens."""
    found: dict[RolloutKey, Numbers] = {}
    for one in trained:
        lengths = [r.length for r in one.rollouts]
        for name, column_A in one.columns.items():
            for r, mine_A in zip(one.rollouts, column_A.cpu().split(lengths), strict=True):
                if r.prompt_id in prompt_ids:
                    found.setdefault(r.key, {}).update(column_of(name, mine_A, r))
    return found


def column_of(name: str, values_A: torch.Tensor, rollout: Rollout) -> Numbers:
    """A column of a record. Of the trainer's logprobs, their differences from the generator's."""
    if name != TRAINER:
        return {name: values_A.tolist()}
    generator_A = torch.tensor(rollout.logprobs, dtype=values_A.dtype)
    return {"logprob_diffs": (values_A - generator_A).tolist()}


def together(process: Process, seed: int, step: int, mine: Sequence[Record]) -> list[Record]:
    """All ranks' records of a step, on rank 0, in the order in which they are kept; none elsewhere.
    Collective."""
    found = [record for share in process.to_rank0(list(mine)) for record in share]
    return sorted(found, key=lambda record: place_of(record, seed, step))
