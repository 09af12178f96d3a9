"""What a run exports, served by a vLLM of its own: the bits of training, and what is refused.

A run, and two vLLMs side by side, each with processes of its own: a minute of CPU time.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from served import NEW_TOKENS, Served, environment, served
from small_engines import CPU, ROOMY
from tiny_qwen3 import load_role, packed

from mesh.engine.native.engine import NativeEngine
from mesh.engine.vllm.checks import install_problems
from mesh.invariant.switch import batch_invariant, ordinary_kernels
from mesh.model.products import self_test_of
from mesh.runs.sample_rows import shortest
from mesh.text.tokenizer import load_tokenizer, textless_ids
from mesh.types import Request, Sampling

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)
ON_A_CPU = {"dtype": "float32", "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 24}
EXACT_THREADS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Served:
    root = tmp_path_factory.mktemp("served")
    return served(root, [], [1, 2], ON_A_CPU, **EXACT_THREADS)


@pytest.mark.parametrize("tp", [1, 2])
def test_prompt_logprobs_are_those_of_samples_jsonl(made, tp):
    """Token for token, of everything that the run sampled."""
    samples, scored = made.run.samples, made.answers[tp]["scored"]
    assert len(samples) == len(scored) == 16
    for sample, logprobs in zip(samples, scored, strict=True):
        assert shortest(logprobs[-len(sample["tokens"]) :]) == sample["logprobs"]
    assert len({x for sample in samples for x in sample["logprobs"]}) > 50


@pytest.fixture(scope="module")
def exact(made, solo_mesh) -> Iterator[tuple[Any, Any]]:
    """(model, shape) of the run's export, where this process is as exact as a run."""
    with batch_invariant(True, "cpu"):
        model, shape = load_role(made.directory, solo_mesh)
        shape = replace(shape, textless=textless_ids(load_tokenizer(made.directory), 128))
        model.lm_head.textless = shape.textless
        self_test_of(shape, 4, torch.float32, CPU, dist.group.WORLD)
        yield model, shape


@pytest.mark.parametrize("tp", [1, 2])
@torch.no_grad()
def test_what_vllm_draws_has_the_logprobs_of_the_trainer(made, exact, tp):
    """Token by token, and scored at once."""
    assert [x for _, x in made.answers[tp]["drawn"]] == made.answers[tp]["again"]
    for kind in ("drawn", "greedy"):
        found = made.answers[tp][kind]
        batch = packed([p + tokens for p, (tokens, _) in zip(made.prompts, found, strict=True)])
        scores = batch.scores(exact[0]).logprobs_A.split([n - 1 for n in batch.lengths])
        for (tokens, logprobs), right in zip(found, scores, strict=True):
            assert len(tokens) == NEW_TOKENS and logprobs == right[-NEW_TOKENS:].tolist()


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_answers_are_the_native_engines(made, exact, tp):
    model, shape = exact
    engine = NativeEngine(model, shape, replace(ROOMY, max_length=64, page_size=16), None)
    engine.reset(version=0)
    requests = [Request(i, tuple(prompt), 1) for i, prompt in enumerate(made.prompts)]
    right = engine.generate(requests, Sampling(0.0, max_new_tokens=NEW_TOKENS, seed=0, step=0))
    found = made.answers[tp]["greedy"]
    assert [(list(c.tokens), list(c.logprobs)) for c in right] == [tuple(one) for one in found]


@torch.no_grad()
def test_without_the_switch_bits_differ(made, exact):
    """The control: ordinary kernels give other logprobs, so that the tests above can see."""
    batch = packed([s["prompt_tokens"] + s["tokens"] for s in made.run.samples])
    with ordinary_kernels():
        scores = batch.scores(exact[0]).logprobs_A.split([n - 1 for n in batch.lengths])
    assert [x.tolist() for x in scores] != made.answers[1]["scored"]


def test_the_entry_point_imports_no_model(tmp_path):
    """vLLM loads it in each of its processes, also where it serves something else."""
    code = (
        "import sys; from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from vllm import ModelRegistry; "
        "print('MeshPolicy' in ModelRegistry.models, 'torchtitan' in sys.modules)"
    )
    words = [sys.executable, "-c", code]
    environ = environment(tmp_path / "metadata")
    result = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=300)
    assert result.stdout.split()[-2:] == ["True", "False"], result.stdout + result.stderr
