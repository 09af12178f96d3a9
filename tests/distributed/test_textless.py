"""Runs of a padded vocabulary: its rows change nothing, whatever is in them, on any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import TWO_RANK_LAYOUTS, Run, runs
from safetensors.torch import load_file, save_file

from mesh.config.schema import PACKAGE_DATA
from mesh.runs.compare import untimed

KNOWN = 98
"""Ids with a text, of 128; in eight tiles the last one has none, and the one before it two."""
EMBEDDING = "model.embed_tokens.weight"  # the tied head
SMALL = [
    "conf=qwen3_tiny", "num_prompts=16", "group_size=4", "steps=2", "eval.every=1",
    "eval.num_prompts=16", "log.tensorboard=false", "log.samples=-1",
    "log.tokens=false",  # from the second step on weights are those of a layout
    "batch_invariant=true", "check=strict",
]  # fmt: skip
CASES = {
    "as shipped": ("shipped", "trainer tp 2"),
    **{f"large, {layout}": ("large", layout) for layout in TWO_RANK_LAYOUTS},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The shipped model; one with padded rows that win most draws that count them; the same with
    tokens for them.
    """
    root = tmp_path_factory.mktemp("models")
    for name in ("shipped", "large"):
        shutil.copytree(PACKAGE_DATA / "qwen3_tiny", root / name)
    file = root / "large" / "model.safetensors"
    weights = load_file(file)
    rows = torch.randn(128 - KNOWN, 128, generator=torch.Generator().manual_seed(0))
    weights[EMBEDDING][KNOWN:] = rows * 20
    save_file(weights, file, metadata={"format": "pt"})
    shutil.copytree(root / "large", root / "named")
    path = root / "named" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"<id {i}>": i for i in range(KNOWN, 128)}
    path.write_text(json.dumps(tokenizer))
    return {name: root / name for name in ("shipped", "large", "named")}


@pytest.fixture(scope="module")
def made(models, tmp_path_factory) -> dict[str, Run]:
    asked = {
        name: ("grpo", [*SMALL, f"model.path={models[model]}", *TWO_RANK_LAYOUTS[layout]])
        for name, (model, layout) in CASES.items()
    }
    words = [*SMALL, f"model.path={models['named']}", "steps=1", "generator.top_k=3"]
    return runs(tmp_path_factory.mktemp("runs"), 2, asked | {"named": ("grpo", words)})


def told(run: Run) -> list[dict]:
    """The metrics, without times and the digest, of which the padded rows are a part."""
    lines = [untimed(line) for line in run.metrics]
    return [{k: v for k, v in m.items() if not k.startswith("digest/")} for m in lines]


@pytest.mark.parametrize("case", [name for name in CASES if name != "as shipped"])
def test_large_rows_without_a_text_change_no_bit(made, case):
    """Of a strict run: every token, reward, logprob, entropy and gradient."""
    run, shipped = made[case], made["as shipped"]
    assert run.samples == shipped.samples and len(run.samples) == 2 * 16 * 4
    assert [m.get("logprob_diff/max") for m in told(run)] == [None, 0.0, 0.0]
    if CASES[case][1] == CASES["as shipped"][1]:
        assert told(run) == told(shipped)
    for mine, theirs in zip(told(run), told(shipped), strict=True):
        for name in ("eval/accuracy", "eval/accuracy_greedy", "reward/mean", "tokens/generated"):
            assert mine.get(name) == theirs.get(name), name


@pytest.mark.parametrize("case", CASES)
def test_their_rows_are_not_trained(made, models, case):
    before = load_file(models[CASES[case][0]] / "model.safetensors")[EMBEDDING]
    after = load_file(made[case].path / "model" / "model.safetensors")[EMBEDDING]
    assert torch.equal(after[KNOWN:], before[KNOWN:])
    assert (after[:KNOWN] != before[:KNOWN]).any(1).sum() > 90


def test_a_tokenizer_with_a_token_for_each_id_draws_them(made):
    """Control: the same weights, and the rows have texts."""
    named = [sample["response"] for sample in made["named"].samples]
    assert sum("<id " in response for response in named) > len(named) / 2


def test_truncated_sampling_is_warned_about_once_by_a_run_that_trains(made):
    warned = {name: run.output.count("warning: generator.top_k=3") for name, run in made.items()}
    assert warned == dict.fromkeys(made, 0) | {"named": 1}
