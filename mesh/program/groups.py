"""The groups of a wave: prompts are answered, scored and exchanged, and replaced where their groups
are equal (`refill_rounds`).

A prompt of round r has the place num_prompts * r + index in the step, in everything that follows:
random numbers, owner, logs. Groups enter in the order of their places until num_prompts are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import Program
from mesh.rl.refill import CORRECT, next_round, quantity_of, unequal_groups
from mesh.rl.step import part_of
from mesh.tasks.drawing import refill_draw
from mesh.tasks.prompts import step_prompts
from mesh.types import NumberedPrompt, Rollout, Wave

EQUAL, SURPLUS = "equal", "surplus"
"""Why a group was not trained on: it is equal in `refill_on`, or the step was full."""


@dataclass(frozen=True)
class Groups:
    """The groups of a wave after the exchange.

    prompts: all that were answered; generated: rollouts that this rank's replica made; drawn: what
    became of all prompts; wave: what is trained on; left_out: why another group is not, by
    prompt_id; metrics: of the rounds after the first.
    """

    prompts: Sequence[NumberedPrompt]
    generated: list[Rollout]
    drawn: Wave
    wave: Wave
    left_out: Mapping[int, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


def groups_of(
    program: Program,
    process: Process,
    phases: Phases,
    step: int,
    prompts: Sequence[NumberedPrompt],
) -> Groups:
    """Generate, score and exchange a group for each prompt, and replace equal ones. Collective."""
    first = exchanged(program, phases, step, prompts)
    if not program.plan.step.refill_rounds:
        return first
    return refilled(program, process, phases, step, first)


def exchanged(
    program: Program, phases: Phases, step: int, prompts: Sequence[NumberedPrompt]
) -> Groups:
    """One round of it."""
    generator, keys = program.generator, program.plan.step
    with phases("generate"):
        sampling = generator.sampling(step)
        rollouts = generator.rollout(
            program.scorer, prompts, keys.group_size, sampling, keys.truncated_reward
        )
    with phases("exchange", program.plan.meetings.exchange):
        wave = program.exchange([p.prompt_id for p in prompts], rollouts)
    return Groups(prompts, rollouts, wave, wave)


def refilled(
    program: Program, process: Process, phases: Phases, step: int, first: Groups
) -> Groups:
    """The groups of all rounds that it takes; fewer than asked for where rounds run out."""
    keys, num_prompts = program.plan.step, program.plan.step.num_prompts
    rounds, found = [first], of_use(program, process, phases, first)
    while len(found) < num_prompts and len(rounds) <= keys.refill_rounds:
        num = next_round(num_prompts, len(found), sum(len(one.prompts) for one in rounds))
        draw = refill_draw(step, len(rounds), num, num_prompts)
        prompts, metrics = step_prompts(program.plan.prompts, process, draw, program.pass_rates)
        more = exchanged(program, phases, step, prompts)
        rounds.append(replace(more, metrics=without_digest(metrics)))
        found += of_use(program, process, phases, more)
    return filled(rounds, found, num_prompts)


def of_use(program: Program, process: Process, phases: Phases, groups: Groups) -> list[int]:
    """The prompts whose groups are not equal. The trainer's ranks know, and rank 0 is one of them.
    Collective."""
    keys, task = program.plan.step, program.plan.task
    with phases("exchange", program.plan.meetings.verdict):
        mine = unequal_groups(groups.drawn, keys.group_size, keys.refill_on, task)
        return list(process.from_rank0(mine))


def filled(rounds: Sequence[Groups], found: Sequence[int], num_prompts: int) -> Groups:
    """The rounds as one. found: the prompts whose groups are of use, in order; the first
    `num_prompts` are trained on.
    """
    whole, kept = joined(rounds), set(found[:num_prompts])
    others = (p.prompt_id for p in whole.prompts if p.prompt_id not in kept)
    counts = {
        "prompts/drawn": len(whole.prompts),
        "prompts/rounds": len(rounds) - 1,
        "groups/kept": len(kept),
        "groups/surplus": len(found) - len(kept),
        "groups/missing": num_prompts - len(kept),
    }
    return replace(
        whole,
        wave=part_of(whole.drawn, kept),
        left_out={place: SURPLUS if place in found else EQUAL for place in others},
        metrics={**whole.metrics, **{name: float(n) for name, n in counts.items()}},
    )


def joined(parts: Sequence[Groups], metrics: Mapping[str, Any] = MappingProxyType({})) -> Groups:
    """Rounds or waves, in order, as one; their metrics, and these, are added up."""
    return Groups(
        [p for one in parts for p in one.prompts],
        [r for one in parts for r in one.generated],
        one_wave([one.drawn for one in parts]),
        one_wave([one.wave for one in parts]),
        {place: why for one in parts for place, why in one.left_out.items()},
        summed([metrics, *(one.metrics for one in parts)]),
    )


def one_wave(waves: Sequence[Wave]) -> Wave:
    """Waves of ascending prompts as one."""
    outlines = [o for wave in waves for o in wave.outlines]
    return Wave(outlines, [r for wave in waves for r in wave.rollouts])


def remember(program: Program, process: Process, step: int, groups: Groups) -> dict[str, float]:
    """Take in how many rollouts of each question were correct, where draws depend on it. Returns
    the metric of it. Collective."""
    rates, keys = program.pass_rates, program.plan.step
    if rates.bounds is None:
        return {}
    correct_PG = quantity_of(groups.drawn, keys.group_size, CORRECT, program.plan.task)
    correct_P = process.from_rank0(correct_PG.sum(1).int().tolist())
    visits = zip(groups.prompts, correct_P, strict=True)
    rates.add(step, ((p.prompt.question, correct, keys.group_size) for p, correct in visits))
    return {"difficulty/known": float(len(rates.known))}


def without_digest(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a draw that is not the step's first."""
    return {name: value for name, value in metrics.items() if name != "digest/prompts"}


def summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All entries; numbers of one name are added up."""
    total: dict[str, Any] = {}
    for part in parts:
        total |= {name: total[name] + x if name in total else x for name, x in part.items()}
    return total
