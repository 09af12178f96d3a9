"""Conversations side by side with single answers of as many tokens: tokens sampled per second.

    python -m tools.bench.conversation [engine=native] [conversations=64] [turns=4] [new=128]
        [reply=8] [prompt=16] [workers=16] [milliseconds=50] [repeats=5] [conf=NAME] ...

One process, one engine with random weights, which takes in turn: single answers of `new` tokens;
conversations of `turns` turns that sample as many, with replies of `reply` tokens that are there at
once (by the engine alone, and through the generator's loop and the scoring processes); and the same
where each reply takes `milliseconds` in one of `workers` processes. `generator.max_sequences` run
at a time, a quarter of the conversations by default, so that others run while some wait. Seconds
are those of the clock where replies take time, else CPU time of this process without a GPU. Other
arguments are configuration keys: `conf=qwen3 conversations=512 prompt=128 new=256` on a GPU.
Exit status 1 if conversations have less than 0.8x the rate of single answers.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.engine.base import Continuation, Engine
from mesh.engine.conversation import Scripted, converse
from mesh.invariant.switch import batch_invariant
from mesh.layout.meshes import resolve_device
from mesh.lifecycle.process import start
from mesh.model.families import shape_of_flavor
from mesh.program.encoding import prompt_encoder
from mesh.program.plan import tokenizer_directory
from mesh.roles.conversation import Conversations, Limits
from mesh.tasks import TaskSpec, load_task
from mesh.tasks.calls import ScoringSettings, TaskSource
from mesh.tasks.scorer import Scorer
from mesh.text.tokenizer import load_tokenizer
from mesh.types import Prompt, Request, Rollout, Sampling
from tools.bench.engine_worker import ready
from tools.bench.vocabulary import known_ids

LEAST = 0.8
DEFAULTS = {
    "conf": "qwen3_tiny", "conversations": "64", "turns": "4", "new": "128", "reply": "8",
    "prompt": "16", "workers": "16", "milliseconds": "50", "repeats": "5",
}  # fmt: skip
OURS = ("conversations", "turns", "new", "reply", "prompt", "workers", "milliseconds", "repeats")


@dataclass(frozen=True)
class Size:
    """The arguments that are no keys."""

    conversations: int
    turns: int
    new: int
    reply: int
    prompt: int
    workers: int
    milliseconds: int
    repeats: int

    @property
    def turn(self) -> int:
        """Tokens that each turn samples."""
        return self.new // self.turns


@dataclass(frozen=True)
class EveryTurn:
    """Ends a turn at its `tokens`-th token, as a stop string does."""

    tokens: int

    def __call__(self, tokens: Sequence[int], start: int = 0) -> bool:
        return len(tokens) - start >= self.tokens


def main(words: list[str]) -> int:
    given = DEFAULTS | dict(word.split("=", 1) for word in words)
    size = Size(**{name: int(given.pop(name)) for name in OURS})
    given.setdefault("generator.max_sequences", str(-(-size.conversations // 4)))
    whole = size.new + size.turns * size.reply
    given.setdefault("model.max_length", str(size.prompt + whole + 1))
    given |= {"generator.max_new_tokens": str(size.new), "conversation.max_tokens": str(whole)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    _, conf = load_conf([f"{name}={value}" for name, value in given.items()])
    device = resolve_device(conf.device)
    with (
        batch_invariant(conf.batch_invariant, device, conf.invariant.chunks),
        start(device, conf.timeout_seconds) as process,
    ):
        shape = shape_of_flavor(conf.model.flavor)
        shape = replace(shape, textless=((known_ids(shape.vocab_size), shape.vocab_size),))
        engine = ready(conf, process, shape)
        process.closers.append(engine.close)
        return report(size, rates(conf, size, engine))


def rates(conf: Conf, size: Size, engine: Engine) -> dict[str, float]:
    """Tokens per second of each way, medians of turns that they take one after the other."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = known_ids(engine.shape.vocab_size)
    rows = torch.randint(vocabulary, (size.conversations, size.prompt), generator=draw).tolist()
    requests = [Request(i, tuple(row), 1) for i, row in enumerate(rows)]
    long = Sampling(temperature=1.0, max_new_tokens=size.new, seed=0, step=0)
    cut = replace(long, max_new_tokens=size.turn + 1, stops=EveryTurn(size.turn))
    script = {
        (r.prompt_id, 0): [Continuation(r.prompt_id, 0, (5,) * size.reply, size.turn + 1)]
        * (size.turns - 1)
        for r in requests
    }
    quick, slow = (scorer_of(size, seconds) for seconds in (0.0, size.milliseconds / 1e3))
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    ways: dict[str, tuple[Callable[[], object], Callable[[], float]]] = {
        "single answers": (lambda: engine.generate(requests, long), clock),
        "conversations": (
            lambda: said(size, converse(engine, requests, cut, Scripted(script))), clock
        ),
        "conversations, replies at once": (
            partial(through_the_loop, conf, size, engine, requests, cut, quick),
            time.perf_counter,
        ),
        f"conversations, replies of {size.milliseconds} ms": (
            partial(through_the_loop, conf, size, engine, requests, cut, slow),
            time.perf_counter,
        ),
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(size.repeats + 1):
        for name, (way, now) in ways.items():
            began = now()
            way()
            taken[name] += [now() - began] if repeat else []  # the first one warms up
    for scorer in (quick, slow):
        scorer.close()
    tokens = size.conversations * size.turn * size.turns
    return {name: tokens / median(seconds) for name, seconds in taken.items()}


def scorer_of(size: Size, seconds: float) -> Scorer:
    args = {"turns": size.turns, "length": size.reply, "seconds": seconds}
    spec = TaskSpec("tools.bench.slow_reply:SlowReply", 0, args)
    scoring = ScoringSettings(size.workers, 60.0, "stop")
    return Scorer(TaskSource(load_task(spec.name, 0, args), spec, scoring))


def through_the_loop(
    conf: Conf,
    size: Size,
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    scorer: Scorer,
) -> None:
    """The generator's own loop, with the scoring processes."""
    encoder = prompt_encoder(conf, load_tokenizer(tokenizer_directory(conf)))
    prompts = {r.prompt_id: Prompt(r.prompt_id, "x", "") for r in requests}
    limits = Limits(size.turns, 0, conf.model.max_length)
    partner = Conversations(scorer, prompts, encoder, limits, sampling, True, None)
    said(size, converse(engine, requests, sampling, partner))


def said(size: Size, rollouts: Sequence[Rollout]) -> None:
    """Assert that everybody had all turns."""
    for rollout in rollouts:
        assert rollout.length == size.turn * size.turns, "a turn was lost"


def report(size: Size, found: dict[str, float]) -> int:
    """Print the table; the exit status."""
    single, talk, at_once, late = found.values()
    bases = {"conversations": single, list(found)[3]: at_once}
    for name, rate in found.items():
        ratio = f"{rate / bases[name]:8.2f}x" if name in bases else ""
        print(f"{name:<40}{rate:>12,.0f} tokens/s{ratio}")
    print(f"conversations over single answers {talk / single:.2f}x, at least {LEAST} is promised; "
          f"replies of {size.milliseconds} ms over none {late / at_once:.2f}x")  # fmt: skip
    return int(talk / single < LEAST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
