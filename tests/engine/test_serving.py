"""What a run exports, served by a vLLM of its own: the bits of training, and what is refused.

About 60 s: a run, and two vLLMs side by side, each with processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import REPOSITORY, Run, run
from small_engines import CPU, ROOMY
from tiny_qwen3 import load_role, packed, random_sequences

from mesh.engine.native.engine import NativeEngine
from mesh.engine.vllm.checks import install_problems
from mesh.invariant.switch import batch_invariant, ordinary_kernels
from mesh.model.products import self_test_of
from mesh.text.tokenizer import load_tokenizer, textless_ids
from mesh.types import Request, Sampling

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)
WORDS = ["conf=qwen3_tiny", "steps=1", "num_prompts=4", "group_size=4", "batch_invariant=true"]
WORDS += ["trainer.lr=1e-30", "log.samples=-1", "log.tokens=true", "log.tensorboard=false"]
WORDS += ["eval.num_prompts=4", "eval.num_samples=1"]
LENGTHS = [1, 16, 5, 22]
"""Of prompts, whose continuations fit the 64 tokens of `CONTEXT`."""
CONTEXT = 64
SETTINGS = {"batch_invariant": True}


def entry_points(place: Path) -> Path:
    """A directory in whose metadata the package has the entry points of pyproject.toml, also where
    the installed metadata is older.
    """
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    metadata = place / "mesh-0.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mesh\nVersion: 0.0.0\n")
    lines = []
    for group, names in declared["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in names.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place


def environment(place: Path) -> dict[str, str]:
    """What a user sets on a CPU, so that sums are those of training; and nothing else of vLLM."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(entry_points(place)), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles the count of likelier tokens, for 5 seconds
    }


@dataclass(frozen=True)
class Served:
    """A run of one step that changes no weight, and what its model answers at tp 1 and 2."""

    run: Run
    prompts: list[list[int]]
    answers: dict[int, dict[str, Any]]

    @property
    def directory(self) -> Path:
        return self.run.path / "model"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    root = tmp_path_factory.mktemp("served")
    trained = run("recipes/grpo.py", root / "run", 1, *WORDS)
    prompts = random_sequences(LENGTHS, seed=9, vocab_size=98)
    scored = [sample["prompt_tokens"] + sample["tokens"] for sample in trained.samples]
    asked = {"scored": scored, "prompts": prompts, "settings": SETTINGS}
    (root / "asked.json").write_text(json.dumps(asked))
    environ = environment(root / "metadata")
    program = str(REPOSITORY / "tests/programs/serve_program.py")
    started = {}
    for tp in (1, 2):
        words = [str(root / "run" / "model"), str(tp), str(root / "asked.json")]
        started[tp] = subprocess.Popen(
            [sys.executable, program, *words, str(root / f"{tp}.json")],
            env=environ, cwd=root, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    for process in started.values():
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-20000:]
        assert "comparisons of" in output, "the self-test's line"
    answers = {tp: json.loads((root / f"{tp}.json").read_text()) for tp in started}
    return Served(trained, prompts, answers)


@pytest.mark.parametrize("tp", [1, 2])
def test_prompt_logprobs_are_those_of_samples_jsonl(served, tp):
    """Token for token, of everything that the run sampled."""
    samples, scored = served.run.samples, served.answers[tp]["scored"]
    assert len(samples) == len(scored) == 16
    for sample, logprobs in zip(samples, scored, strict=True):
        assert logprobs[-len(sample["tokens"]) :] == sample["logprobs"]
    assert len({x for sample in samples for x in sample["logprobs"]}) > 50


@pytest.fixture(scope="module")
def exact(served, solo_mesh) -> Iterator[tuple[Any, Any]]:
    """(model, shape) of the run's export, where this process is as exact as a run."""
    with batch_invariant(True, "cpu"):
        model, shape = load_role(served.directory, solo_mesh)
        shape = replace(shape, textless=textless_ids(load_tokenizer(served.directory), 128))
        model.lm_head.textless = shape.textless
        self_test_of(shape, 4, torch.float32, CPU, dist.group.WORLD)
        yield model, shape


@pytest.mark.parametrize("tp", [1, 2])
@torch.no_grad()
def test_what_vllm_draws_has_the_logprobs_of_the_trainer(served, exact, tp):
    for kind in ("drawn", "greedy"):
        found = served.answers[tp][kind]
        batch = packed([p + tokens for p, (tokens, _) in zip(served.prompts, found, strict=True)])
        scores = batch.scores(exact[0]).logprobs_A.split([n - 1 for n in batch.lengths])
        for (tokens, logprobs), right in zip(found, scores, strict=True):
            assert len(tokens) == 20 and logprobs == right[-20:].tolist()


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_answers_are_the_native_engines(served, exact, tp):
    model, shape = exact
    engine = NativeEngine(model, shape, replace(ROOMY, max_length=CONTEXT, page_size=16), None)
    engine.reset(version=0)
    requests = [Request(i, tuple(prompt), 1) for i, prompt in enumerate(served.prompts)]
    right = engine.generate(requests, Sampling(0.0, max_new_tokens=20, seed=0, step=0))
    found = served.answers[tp]["greedy"]
    assert [(list(c.tokens), list(c.logprobs)) for c in right] == [tuple(one) for one in found]


@torch.no_grad()
def test_without_the_switch_bits_differ(served, exact):
    """The control: ordinary kernels give other logprobs, so that the tests above can see."""
    batch = packed([s["prompt_tokens"] + s["tokens"] for s in served.run.samples])
    with ordinary_kernels():
        scores = batch.scores(exact[0]).logprobs_A.split([n - 1 for n in batch.lengths])
    assert [x.tolist() for x in scores] != served.answers[1]["scored"]


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
