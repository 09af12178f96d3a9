"""Validation runs of the families with vLLM: its engine has the native one's bits (L6)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Run, runs
from tiny_families import RUNNING
from tiny_qwen3 import save_checkpoint

from mesh.engine.vllm.checks import install_problems

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)
WORDS = [
    "conf=qwen3_tiny", "model.tokenizer=package:characters", "engine=vllm", "model.max_length=64",
    "num_prompts=4", "group_size=4", "generator.max_new_tokens=32", "validate.sequences=9",
    "validate.steps=1", "log.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def validated(tmp_path_factory) -> dict[str, Run]:
    """A validation run of each family, in one launch."""
    root, asked = tmp_path_factory.mktemp("families"), {}
    for family, variant in RUNNING.items():
        directory = root / "models" / family
        save_checkpoint(directory, variant)
        words = [*WORDS, f"model.path={directory}", f"run_dir={root / family / 'run'}"]
        asked[family] = ("validate", words)
    return runs(root, 1, asked)


@pytest.mark.parametrize("family", RUNNING)
def test_vllm_has_the_tokens_and_logprobs_of_the_native_engine(validated, family):
    report = json.loads(Path(validated[family].path / "validation.json").read_text())
    assert report["passed"] is True
    rows = {c["what"]: c for c in report["checks"] if c["rung"] == "L6"}
    whats = [what.removeprefix("engine=vllm vllm.model=titan, ") for what in rows]
    assert whats == ["the whole batch", "prefill 7 tokens at a time", "sequences preempted"]
    assert [row["result"] for row in rows.values()] == ["pass"] * 3
    assert all(row["tally"]["compared"] > 20 for row in rows.values())
