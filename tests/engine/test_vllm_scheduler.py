"""Our scheduler decides, step by step, what vLLM's own would. Tokens are made up: no model runs."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from mesh.engine.vllm.checks import install_problems
from mesh.model.families import config_entries
from mesh.types import ModelShape, Request, Sampling

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

from mesh.engine.vllm.requests import Kept, core_request
from mesh.engine.vllm.scheduler import DecodeScheduler

PAGE, LONGEST, VOCAB = 4, 48, 50
STOP = 7
SHAPE = ModelShape(
    vocab_size=VOCAB, dim=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, ffn_dim=64,
    tied=False, max_positions=LONGEST,
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(config_entries(SHAPE, ())))
    return directory


def scheduler_of(kind: type[Scheduler], directory, pages: int, prefix_cache: bool) -> Scheduler:
    config = EngineArgs(
        model=str(directory),
        skip_tokenizer_init=True,
        max_model_len=LONGEST,
        max_num_seqs=6,
        max_num_batched_tokens=9,
        enable_prefix_caching=prefix_cache,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = pages
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(pages, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=PAGE,
        hash_block_size=PAGE,
    )


class Run:
    """One scheduler at its work: `underway` steps are scheduled before the first is read."""

    def __init__(self, scheduler: Scheduler, seed: int, underway: int) -> None:
        self.scheduler, self.underway = scheduler, underway
        self.steps: deque = deque()
        self.draw, hasher = random.Random(seed), get_hash_fn_by_name("sha256")
        init_none_hash(hasher)
        self.core = SimpleNamespace(request_block_hasher=get_request_block_hasher(PAGE, hasher))
        self.requests: list = []

    def ask(self, version: int) -> None:
        """Sequences of many lengths, under the same names each time."""
        self.requests.clear()
        for i in range(12):
            prompt = tuple(self.draw.choices(range(VOCAB), k=self.draw.choice([1, 3, 8, 13, 30])))
            most = self.draw.choice([1, 2, 5, 17, 60])
            self.add([Request(i, prompt, 2)], most, stop_tokens=(STOP,), version=version)

    def add(self, asked, max_new_tokens, stop_tokens, version=0) -> None:
        sampling = Sampling(1.0, max_new_tokens, 0, 0, stop_tokens=stop_tokens)
        for request in asked:
            made = [
                core_request(self.core, one, sampling, max_new_tokens, version, 0)
                for sample in range(request.num_samples)
                for one in [
                    Kept((request.prompt_id, sample), request.tokens, len(request.tokens), False)
                ]
            ]
            self.requests += made
            for one in made:
                self.scheduler.add_request(one)

    def step(self) -> dict | None:
        """What vLLM's engine core does in a step; returns what was decided, if anything was."""
        decided = None
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            drawn = {name: self._draw(name) for name in output.num_scheduled_tokens}
            self.steps.append((output, drawn))
            decided = _decisions(output)
            if len(self.steps) < self.underway and (drawn or self.scheduler.has_requests()):
                return decided
        self._read(*self.steps.popleft())
        return decided

    @property
    def through(self) -> bool:
        return not self.scheduler.has_requests() and not self.steps

    def _draw(self, name: str) -> list[int]:
        """Depends on the sequence and the position alone; none amid a prompt."""
        request = self.scheduler.requests[name]
        if request.is_prefill_chunk:
            return []
        return [random.Random(f"{name} {request.num_computed_tokens}").randrange(VOCAB)]

    def _read(self, output, drawn: dict[str, list[int]]) -> None:
        rows = {name: i for i, name in enumerate(drawn)}
        self.scheduler.update_from_output(
            output, ModelRunnerOutput(list(drawn), rows, list(drawn.values()))
        )

    def state(self) -> tuple:
        pool = self.scheduler.kv_cache_manager.block_pool
        requests = [
            (r.request_id, list(r.output_token_ids), r.status, r.stop_reason, r.num_preemptions,
             r.num_computed_tokens, r.num_in_flight_tokens, r.num_stale_output_tokens,
             r.num_output_placeholders)
            for r in self.requests
        ]  # fmt: skip
        running = [r.request_id for r in self.scheduler.running]
        cached = sorted(block.block_id for block in pool.blocks if block.block_hash is not None)
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        return requests, running, free, cached


def _decisions(output) -> dict:
    """All that the runner is told."""
    told = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    told["scheduled_new_reqs"] = [vars(request) for request in output.scheduled_new_reqs]
    return told


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("pages", [15, 25, 200])
@pytest.mark.parametrize(("theirs", "underway"), [(Scheduler, 1), (AsyncScheduler, 2)])
def test_every_decision_is_vllms(directory, theirs, underway, pages, prefix_cache):
    """From a cache that preempts all the time to one that never does."""
    preemptions = 0
    for seed in range(12):
        runs = [
            Run(scheduler_of(kind, directory, pages, prefix_cache), seed, underway)
            for kind in (theirs, DecodeScheduler)
        ]
        for version in (0, 1):
            for run in runs:
                run.ask(version)
            finished: list = []
            while not runs[0].through:
                assert not runs[1].through
                expected, found = (run.step() for run in runs)
                assert found == expected
                assert runs[1].state() == runs[0].state()
                finished += runs[1].scheduler.take_finished()
                assert set(finished) == {r for r in runs[1].requests if r.is_finished()}
            assert runs[1].through and len(finished) == len(runs[1].requests)
            assert all(run.scheduler.reset_prefix_cache() for run in runs)
        preemptions += sum(r.num_preemptions for r in runs[1].requests)
    assert (preemptions > 0) == (pages < 200)


@pytest.mark.parametrize("sequences", [6, 20], ids=["a full house", "with a queue"])
@pytest.mark.parametrize("spare", [0, 3])
def test_every_step_of_decodes_takes_the_fast_path(directory, monkeypatch, sequences, spare):
    """Six sequences of two pages at a time, in a cache that they fill: vLLM is asked where a prompt
    or a new sequence is in the step, and nowhere else."""
    scheduler = scheduler_of(DecodeScheduler, directory, 1 + 6 * 2 + spare, prefix_cache=False)
    run, long = Run(scheduler, 0, 2), []
    monkeypatch.setattr(AsyncScheduler, "schedule", noting(AsyncScheduler.schedule, long))
    run.add([Request(i, (i, i, i), 1) for i in range(sequences)], 2 * PAGE - 3, stop_tokens=())
    steps = 0
    while not run.through:
        run.step()
        steps += 1
    with_prompts = [output for output in long if output.scheduled_new_reqs]
    assert len(long) == len(with_prompts) < steps / 2


def noting(schedule, outputs: list):
    def noted(self, throttle_prefills: bool = False):
        outputs.append(schedule(self, throttle_prefills))
        return outputs[-1]

    return noted
