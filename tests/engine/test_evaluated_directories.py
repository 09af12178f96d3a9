"""Evaluation of a directory by every engine: a Llama and a Qwen2 that nothing here has trained.

Six programs on one rank in one launch, a minute or two, most of it vLLM's start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from launching import Run, runs
from tiny_families import RUNNING
from tiny_qwen3 import save_checkpoint

from mesh.engine.vllm.checks import install_problems
from mesh.runs.lines import read_lines

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)
WORDS = [
    "conf=qwen3_tiny", "model.tokenizer=package:characters", "model.max_length=64",
    "eval.num_prompts=6", "eval.num_samples=2", "generator.max_new_tokens=6",
    "eval.sets.cold.temperature=0.7", "eval.sets.cold.top_k=9", "eval.sets.cold.greedy=false",
    "eval.results=results.jsonl",
]  # fmt: skip
ENGINES = {
    "native": ["batch_invariant=true"],
    "titan": ["batch_invariant=true", "engine=vllm"],
    "vllm": ["engine=vllm", "vllm.model=native"],
}
# vLLM's own attention on a CPU takes heads of 32
FAMILIES = {name: replace(RUNNING[name], dim=dim) for name, dim in (("llama", 192), ("qwen2", 128))}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("directories")
    asked = {}
    for family, variant in FAMILIES.items():
        directory = root / "models" / family
        save_checkpoint(directory, variant)
        for engine, words in ENGINES.items():
            asked[f"{family} {engine}"] = ("evaluate", [*WORDS, *words, f"model.path={directory}"])
    return runs(root, 1, asked)


def results(run: Run) -> Path:
    return run.path.parent / "results.jsonl"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_engines_have_the_same_results_to_the_byte(evaluated, family):
    native, titan = (results(evaluated[f"{family} {engine}"]) for engine in ("native", "titan"))
    assert native.read_bytes() == titan.read_bytes()
    rows = read_lines(native)
    assert [row["set"] for row in rows] == [*[""] * 6, *["cold"] * 6]
    assert len({text for row in rows for text in row["responses"]}) > 6


@pytest.mark.parametrize("family", FAMILIES)
def test_vllms_own_model_gives_the_same_answers_but_for_rounding(evaluated, family):
    """Ties of rounding are rare in fp32: most answers are the same, greedy and sampled."""
    native, vllm = (read_lines(results(evaluated[f"{family} {e}"])) for e in ("native", "vllm"))
    same = [
        one == other
        for mine, theirs in zip(native, vllm, strict=True)
        for one, other in zip(mine["responses"], theirs["responses"], strict=True)
    ]
    assert sum(same) >= 0.8 * len(same) and len(same) == 24
    assert "held-out prompts x 2 samples, model " in evaluated[f"{family} vllm"].output
