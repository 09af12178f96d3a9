"""One walk of the ladder: the batch that every rung generates and scores, and how a step is taken.

Prompts are the task's own, put end to end and cut, so that lengths cover the context whatever the
task asks; the samples of a prompt share it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from mesh.config.schema import Conf
from mesh.engine.base import Continuation, Engine
from mesh.engine.conversation import Script, scripted
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import Program
from mesh.program.plan import Plan
from mesh.rl.samples import StepRecord
from mesh.rl.step import ScoredWave
from mesh.roles.generator import Generator
from mesh.tasks import Draw
from mesh.tasks.prompts import step_prompts
from mesh.tasks.replying import converses
from mesh.types import Request, Rollout, RolloutKey, Sampling

SAMPLES = 4  # of a prompt, where the task gives prompts enough
LONGEST = 1024  # prompt tokens: a long context is not filled for its own sake
REPLIES = 2  # in a sequence of the batch, where the task has conversations
MORE = 96  # tokens of such a sequence after its first turn

Inspect = Callable[[Program, Process, ScoredWave], None]
TakeStep = Callable[[Program, Process, Phases, int, Inspect], StepRecord]
"""`train_step` of recipes/grpo.py, which is handed down by whoever walks."""


@dataclass(frozen=True)
class Walk:
    """One walk of the ladder. conf: the layouts that are asked for, and how much is compared;
    requests: the batch; script: the replies in it, where the task has conversations; seek: name the
    module where something differs (off in the control, where everything does).
    """

    conf: Conf
    plan: Plan
    process: Process
    requests: list[Request]
    take_step: TakeStep
    seek: bool
    script: Script | None = None


def mixed_requests(conf: Conf, plan: Plan, process: Process) -> list[Request]:
    """`validate.sequences` sequences of prompts of mixed lengths, 1 and the longest included.
    Collective."""
    total = conf.validate.sequences
    drawn, _ = step_prompts(plan.prompts, process, Draw(0, plan.step.num_prompts))
    prompts = drawn[: -(-total // SAMPLES)]
    texts = [plan.encoder.tokens(prompt.prompt) for prompt in prompts]
    room = min(spare_of(plan) - _more(plan), LONGEST)
    numbers = random.Random(conf.seed)
    lengths = [1, room, *(numbers.randint(1, room) for _ in prompts)][: len(prompts)]
    samples, more = divmod(total, len(prompts))
    return [
        Request(index, _tokens(texts, index, length), samples + (index < more))
        for index, length in enumerate(lengths)
    ]


def spare_of(plan: Plan) -> int:
    """Tokens of the context beside a whole response."""
    return plan.trainer.max_length - plan.generator.max_new_tokens


def _more(plan: Plan) -> int:
    """The most tokens after the first turn of a sequence of the batch."""
    return min(MORE, spare_of(plan) // 2) if converses(plan.task) else 0


def mixed_script(conf: Conf, plan: Plan, requests: Sequence[Request]) -> Script | None:
    """Two replies of any length to every sequence of the batch, and turns of any length after them;
    None where the task replies nothing.
    """
    if not converses(plan.task):
        return None
    numbers, most = random.Random(conf.seed), _more(plan) // (2 * REPLIES)
    texts = [request.tokens for request in requests]
    return {
        (index, sample): [
            Continuation(
                index,
                sample,
                _tokens(texts, numbers.randrange(len(texts)), numbers.randint(0, most)),
                numbers.randint(1, max(1, most)),
            )
            for _ in range(REPLIES)
        ]
        for index, request in enumerate(requests)
        for sample in range(request.num_samples)
    }


def _tokens(texts: Sequence[tuple[int, ...]], first: int, length: int) -> tuple[int, ...]:
    """Tokens of the texts from the `first` on, cyclically, as many as asked for."""
    endless = (token for text in cycle([*texts[first:], *texts[:first]]) for token in text)
    return tuple(islice(endless, length))


def sampling_of(generator: Generator) -> Sampling:
    """Sampling of the batch: as rollouts are drawn, but every response to its full length."""
    return replace(generator.sampling(0), stop_tokens=(), stops=None)


def part_of(requests: Sequence[Request], size: int) -> list[Request]:
    """`size` of the sequences, starting at a request that depends on the size."""
    start = 7 * size % len(requests)
    part: list[Request] = []
    for request in [*requests[start:], *requests[:start]]:
        part.append(replace(request, num_samples=min(request.num_samples, size)))
        size -= part[-1].num_samples
        if size == 0:
            return part
    raise AssertionError(f"{size} sequences too many were asked for")


def generate(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    script: Script | None = None,
) -> dict[RolloutKey, Rollout]:
    """The engine's completions of the requests as rollouts, without rewards; with a script they are
    conversations.
    """
    return {r.key: r for r in scripted(engine, requests, sampling, script)}
