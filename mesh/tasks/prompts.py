"""The prompts of a step, as all ranks agree on them: the same on each, and each of them usable.

A prompt is no use where it leaves no room for a response, or where the tokenizer does not know a
part of it. It ends the run, or (`overlong=skip`) another one is drawn in its place. Every rank
draws all prompts; ranks share the work of encoding them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from mesh.config.keys import problem
from mesh.lifecycle.agreement import Part, difference, text_of
from mesh.lifecycle.process import Process
from mesh.tasks import Draw, Task, draw_prompts, numbered
from mesh.tasks.difficulty import MAX_ROUNDS, Offers, PassRates
from mesh.tasks.held_out import HeldOut
from mesh.tasks.solution import Taught, solution_of, taught
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import OTHER_TOKENIZER, Tokenizer, Unencodable, UnknownText
from mesh.types import NumberedPrompt, Prompt

Overlong = Literal["stop", "skip"]

CHANGE = "change the text"
SHOWN = 200  # characters of a prompt in a message
PURE = (
    "prompts must be a function of (seed, step, index) and of nothing else: no random numbers "
    "without a seed, no order of a set or hash, no rank, no clock, no state, the same files on "
    "every machine"
)


@dataclass(frozen=True)
class PromptSource:
    """The task that is trained on, and the prompts of it that can be used.

    A prompt and its response take at most `max_length` tokens, which the model allows up to
    `max_positions`; a response takes `max_new_tokens`, or (`teaches`) it is the task's solution
    with the ends of its turns. stops: strings that end a turn. held_out: what is evaluated on,
    which training should not draw.
    """

    task: Task
    encoder: PromptEncoder
    overlong: Overlong
    max_length: int
    max_positions: int
    max_new_tokens: int
    teaches: bool = False
    stops: tuple[str, ...] = ()
    held_out: HeldOut = field(default_factory=HeldOut, compare=False)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    def taught(self, prompt: Prompt) -> Taught:
        """The tokens of the task's solution. Raises ValueError where it has none."""
        solution = solution_of(self.task, prompt)
        return taught(self.encoder, prompt, solution, self.tokenizer.eos_ids[0], self.stops)

    def fault(self, prompt: Prompt) -> Fault | None:
        """Why a prompt cannot be used; None: it can."""
        try:
            tokens = len(self.encoder.tokens(prompt))
            response = self.max_new_tokens
            if self.teaches:
                response = len(self.taught(prompt).tokens)
        except Unencodable as error:
            remedy = CHANGE if isinstance(error, UnknownText) else error.remedy
            return Fault(error.wrong, remedy=remedy)
        if not tokens:
            return Fault(f"the prompt {prompt.question!r} has no token")
        if tokens + response <= self.max_length:
            return None
        length = (
            f"{tokens + response} tokens with its solution and the end of sequence"
            if self.teaches
            else f"{tokens} tokens, which with generator.max_new_tokens={response} is longer than "
            "the context"
        )
        return Fault(f"the prompt {prompt.question[:SHOWN]!r} has {length}", tokens + response)


@dataclass(frozen=True)
class Fault:
    """Why a prompt cannot be used. needed: the context in which it could be, 0: in none; remedy:
    what to do about it, where it is not too long.
    """

    text: str
    needed: int = 0
    remedy: str = CHANGE


Faults = Mapping[int, Fault]
"""By index of the prompt among those that were looked at."""


def step_prompts(
    source: PromptSource, process: Process, draw: Draw, rates: PassRates | None = None
) -> tuple[list[NumberedPrompt], dict[str, Any]]:
    """The usable prompts of a draw, and the metrics of it, the same on every rank. `digest/prompts`
    is of what the task drew, before any is skipped.

    Prompts that are too easy or too hard by their pass rates, and with overlong=skip those that
    cannot be used, are replaced in their places by those of later rounds, a function of (seed,
    step, pass rates) as they are. Raises ValueError, on every rank alike, where
    ranks have different prompts, where one cannot be used and is not to be skipped, and where
    `MAX_ROUNDS` rounds did not give enough. Collective.
    """
    step = f"step {draw.step + 1}" + (f", refill {draw.refill}" if draw.refill else "")
    offers = Offers(source.task, draw, rates or PassRates())
    prompts = offers.take(draw.num)
    faults = faults_of(source, process, prompts, f"prompts of {step}")
    if faults and source.overlong == "stop":
        lines = fault_lines(source, faults, f"{draw.num} prompts of {step}", running=True)
        raise ValueError(f"{step}: {'; '.join(lines)}")
    skipped = 0
    for round in range(1, MAX_ROUNDS):
        if not faults:
            break
        places = sorted(faults)
        skipped += len(places)
        others = offers.take(len(places))
        found = faults_of(source, process, others, f"prompts of {step}, round {round}")
        for place, other in zip(places, others, strict=True):
            prompts[place] = other
        faults = {places[index]: fault for index, fault in found.items()}
    if faults:
        drawn = f"{skipped + len(faults)} that were drawn in {MAX_ROUNDS} rounds and are of no use"
        lines = fault_lines(source, faults, drawn, running=True)
        raise ValueError(
            f"{step}: overlong=skip: {len(faults)} of {draw.num} prompts are still missing after "
            f"{MAX_ROUNDS} rounds; {'; '.join(lines)}"
        )
    metrics: dict[str, Any] = {"digest/prompts": digest_of(offers.first)} | offers.metrics
    metrics |= {"prompts/skipped": float(skipped)} if source.overlong == "skip" else {}
    metrics |= source.held_out.metrics(prompts)
    for warning in source.held_out.warning(prompts, f"prompts of {step}"):
        process.say(warning)
    return numbered(prompts, draw.first_id), metrics


def digest_of(prompts: Sequence[Prompt]) -> str:
    """16 hex digits of the prompts with all their fields."""
    part = Part(
        "prompts", {str(place): text_of(prompt) for place, prompt in enumerate(prompts)}, ""
    )
    return f"{part.digest % (1 << 64):016x}"


def digest_of_step(source: PromptSource, num: int, step: int) -> str:
    """The metric `digest/prompts` of a step (1, 2, ...), from prompts that are drawn again."""
    return digest_of(draw_prompts(source.task, Draw(step - 1, num)))


def faults_of(
    source: PromptSource, process: Process, prompts: Sequence[Prompt], name: str
) -> Faults:
    """What is wrong with which of these prompts, on every rank; ValueError, on every rank alike,
    where ranks have different ones. name: of the prompts, as in "prompts of step 1". Collective.
    """
    rank, ranks = dist.get_rank(process.cpu_group), dist.get_world_size(process.cpu_group)
    part = Part(f"the {name}", texts_of(source, prompts), PURE)
    mine = {
        index: fault
        for index in range(rank, len(prompts), ranks)
        if (fault := source.fault(prompts[index])) is not None
    }
    rows = [torch.empty(2, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(rows, torch.tensor([part.digest, len(mine)]), group=process.cpu_group)
    digests, counts = zip(*(row.tolist() for row in rows), strict=True)
    if wrong := difference(process, part, digests):
        raise ValueError(wrong)
    shares = process.gather(mine) if any(counts) else []
    return {index: share[index] for share in shares for index in sorted(share)}


def usable(source: PromptSource, process: Process, prompts: Sequence[Prompt]) -> list[Prompt]:
    """These prompts without those that overlong=skip leaves out. Collective."""
    if source.overlong == "stop":  # whoever checked them has refused what cannot be used
        return list(prompts)
    faults = faults_of(source, process, prompts, "prompts of the data set")
    return [prompt for index, prompt in enumerate(prompts) if index not in faults]


def texts_of(source: PromptSource, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Every prompt as a text with all its fields; where solutions are taught, with that too."""
    texts = {f"prompt {place}": text_of(prompt) for place, prompt in enumerate(prompts)}
    if source.teaches:
        for place, prompt in enumerate(prompts):
            texts[f"the solution of prompt {place}"] = text_of(solution_of(source.task, prompt))
    return texts


def fault_lines(
    source: PromptSource, faults: Faults, total: str, running: bool = False, skips: bool = True
) -> list[str]:
    """A line for prompts that are too long, with the longest, and one for those that no context
    would help, with the first.

    total: how many were looked at, as in "64 prompts of step 1"; running: what to do is for a
    resumed run; skips: overlong=skip skips prompts of this kind.
    """
    long = [fault for fault in faults.values() if fault.needed]
    others = [faults[index] for index in sorted(faults) if not faults[index].needed]
    skip = ["overlong=skip"] if skips and source.overlong == "stop" else []
    resumes = running and not source.teaches
    found = []
    if long:
        worst = max(long, key=lambda fault: fault.needed)
        fits = worst.needed <= source.max_positions
        refused = resumes and source.overlong == "skip"
        raised = [f"use at least {worst.needed}"] if fits and not refused else []
        ways = [*raised, "shorter prompts", *skip]
        limit = "" if fits else f", and the model's own context is {source.max_positions}"
        wrong = f"{worst.text} ({len(long)} of {total}){limit}"
        line = problem("model.max_length", source.max_length, wrong, choice(ways))
        found.append(line + resumable([*raised, *skip] if resumes else []))
    if others:
        remedy = others[0].remedy
        ways = [remedy, *([OTHER_TOKENIZER] if remedy == CHANGE and not running else []), *skip]
        wrong = f"{others[0].text} ({len(others)} of {total})"
        found.append(f"{wrong}: {choice(ways)}{resumable(skip if resumes else [])}")
    return found


def choice(ways: Sequence[str]) -> str:
    """`a`, `a, or b`, `a, b, or c`."""
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"


def resumable(keys: Sequence[str]) -> str:
    """The sentence that these remedies may be given to a resumed run."""
    return f"; resume=RUN_DIR takes {'either key' if keys[1:] else 'that key'}" if keys else ""
