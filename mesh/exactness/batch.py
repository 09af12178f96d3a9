"""The batch that is generated and scored in many ways: prompts of every length, and its parts.

Prompts are the task's own, put end to end and cut, so that lengths cover the context whatever the
task asks; the samples of a prompt share it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from mesh.config.schema import Conf
from mesh.engine.base import Engine
from mesh.exactness.bits import Key
from mesh.lifecycle.process import Process
from mesh.program.assembly import Parts, train_prompts
from mesh.roles.generator import Generator
from mesh.types import Request, Rollout, Sampling

SAMPLES = 4  # of a prompt, where the task gives prompts enough
LONGEST = 1024  # prompt tokens: a long context is not filled for its own sake


@dataclass(frozen=True)
class Walk:
    """What all rungs of one walk share. requests: the batch; seek: name the module where something
    differs (a control differs everywhere, and nobody asks where).
    """

    conf: Conf
    process: Process
    parts: Parts
    requests: list[Request]
    seek: bool


def mixed_requests(conf: Conf, parts: Parts) -> list[Request]:
    """`validate.sequences` sequences of prompts of mixed lengths, 1 and the longest included."""
    total = conf.validate.sequences
    prompts = train_prompts(conf, parts.task)[: -(-total // SAMPLES)]
    texts = [tuple(parts.tokenizer.encode(prompt.text)) for prompt in prompts]
    room = min(conf.model.max_length - conf.generator.max_new_tokens, LONGEST)
    numbers = random.Random(conf.seed)
    lengths = [1, room, *(numbers.randint(1, room) for _ in prompts)][: len(prompts)]
    samples, more = divmod(total, len(prompts))
    return [
        Request(index, _tokens(texts, index, length), samples + (index < more))
        for index, length in enumerate(lengths)
    ]


def _tokens(texts: Sequence[tuple[int, ...]], first: int, length: int) -> tuple[int, ...]:
    """Tokens of the texts from the `first` on, round and round, as many as asked for."""
    endless = (token for text in cycle([*texts[first:], *texts[:first]]) for token in text)
    return tuple(islice(endless, length))


def sampling_of(generator: Generator) -> Sampling:
    """How the batch is drawn: as rollouts are, but every response to its full length."""
    return replace(generator.sampling(0), stop_tokens=())


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


def generate(engine: Engine, requests: Sequence[Request], sampling: Sampling) -> dict[Key, Rollout]:
    """What the engine makes of the requests, without rewards."""
    prompts = {request.prompt_id: request.tokens for request in requests}
    return {
        (c.prompt_id, c.sample_id): Rollout(
            c.prompt_id, c.sample_id, prompts[c.prompt_id], c.tokens, c.logprobs, 0.0,
            c.finish_reason,
        )
        for c in engine.generate(requests, sampling)
    }  # fmt: skip
