"""One call of a task's `reply` and one of its `score` at the start, before a model is built.

Both get an answer without a text, which a model may give at any time. So a reply that is no text,
messages without a chat template and a part with a name of ours are found at once, and not where the
first answer is scored. The task that is asked is not the run's own: nothing of that is changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.lifecycle.process import Process
from mesh.program.plan import task_spec
from mesh.tasks import Task, load_task
from mesh.tasks.calls import REMEDIES, Calls, TaskSource
from mesh.tasks.replying import converses
from mesh.tasks.response import Response
from mesh.tasks.scorer import scoring_of
from mesh.tasks.scoring import Outcome
from mesh.tasks.told import tell_tokenizer
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import Unencodable
from mesh.types import Prompt

SHOWN = 200  # characters of a reply in a message
ZERO = "count it as 0.0 (reward.on_failure=zero)"
FRAME = re.compile(r'File "(.+)", line (\d+)')


@dataclass(frozen=True)
class Fault:
    """The fault of a call. certain: it is in what was returned, and not of this answer alone."""

    method: str
    text: str
    remedy: str
    certain: bool


def first_call_problems(
    process: Process, conf: Conf, task: Task, encoder: PromptEncoder, prompts: Sequence[Prompt]
) -> list[str]:
    """What `reply` and `score` return of which no run could make use, with an empty answer to the
    first prompt. Warns of calls that raise, hang or end their process: they may take any other
    answer. With reward.on_failure=zero all of them are warnings. Rank 0 calls. Collective.

    Without a prompt, which is reported elsewhere, nothing is called.
    """
    source = TaskSource(task, task_spec(conf), scoring_of(conf))
    wrong: list[str] = []
    faults: list[Fault] = []
    if process.rank == 0 and prompts:
        try:
            faults = faults_of(source, encoder, prompts[0])
        except ValueError as error:  # the prompt cannot be sent to a process
            wrong = str(error).splitlines()
    wrong, faults = process.from_rank0((wrong, faults))
    name, stops = source.spec.name, source.scoring.on_failure == "stop"
    for fault in faults:
        said = f"{fault.method} {fault.text}, asked at the start with an empty answer"
        if fault.certain and stops:
            wrong.append(problem("task", name, said, fault.remedy))
            continue
        would = "end the run" if stops else "count as 0.0"
        remedy = f"{fault.remedy}, or {ZERO}" if stops else fault.remedy
        process.say(
            f"warning: task={name}: {said}, which a model may give: it would {would}; {remedy}"
        )
    return wrong


def faults_of(source: TaskSource, encoder: PromptEncoder, prompt: Prompt) -> list[Fault]:
    """The faults of a call each of `reply`, where the task has it, and of `score`."""
    empty = Response("", tokens=encoder.tokenizer.eos_ids[:1])
    asked: dict[str, tuple[Any, ...]] = {"score": (empty,)}
    if converses(source.task):
        asked = {"reply": (empty.turns, 0)} | asked
    scoring = replace(source.scoring, workers=min(1, source.scoring.workers), on_failure="zero")
    found = []
    with closing(Calls(replace(source, task=another(source), scoring=scoring))) as calls:
        for method, arguments in asked.items():
            calls.submit(method, method, prompt, *arguments)
            ((_, outcome),) = calls.poll()
            found.append(fault_of(method, outcome, encoder, prompt, empty))
    return [fault for fault in found if fault is not None]


def fault_of(
    method: str, outcome: Outcome, encoder: PromptEncoder, prompt: Prompt, empty: Response
) -> Fault | None:
    """The fault of a call; None: its outcome can be used."""
    if outcome.problem:
        text = " ".join(f"{outcome.problem}{place_of(outcome)}".split())
        return Fault(method, text, REMEDIES[method], outcome.returned)
    if outcome.reply is None:
        return None
    try:
        encoder.after(prompt, empty.turns, outcome.reply)
    except Unencodable as error:
        text = f"returned {outcome.reply!r:.{SHOWN}}: {error.wrong}"
        return Fault(method, text, error.remedy, certain=True)
    return None


def another(source: TaskSource) -> Task:
    """The task made again where it would be called in this process, so that what its methods
    remember is not what they remember of the start."""
    if source.scoring.workers:
        return source.task
    spec = source.spec
    task = load_task(spec.name, spec.seed, dict(spec.args))
    tell_tokenizer(task, spec.tokenizer)
    return task


def place_of(outcome: Outcome) -> str:
    """Where a call raised, hung or crashed, in brackets; nothing where no place is known."""
    frames = FRAME.findall(outcome.detail)
    if not frames:
        return ""
    file, line = frames[0 if "most recent call first" in outcome.detail else -1]
    return f" ({file}, line {line})"
