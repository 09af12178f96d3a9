"""Evaluation of several sets in a run and alone, in layouts of two ranks: equal to the bit, to the
last byte of the results. Four small programs on two ranks, about 30 s.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import TWO_RANK_LAYOUTS, Run, runs

EXACT = ["conf=qwen3_tiny", "batch_invariant=true", "eval.num_prompts=7", "eval.num_samples=3"]
SETS = [
    "eval.k=[1,2,3]", "eval.sets.cold.temperature=0.5", "eval.sets.cold.num_prompts=1",
    "eval.sets.greedy.temperature=0", "eval.sets.sums.task=arithmetic",
    "eval.sets.sums.stop=3", "eval.sets.sums.max_new_tokens=3", "eval.sets.sums.top_k=2",
]  # fmt: skip
FILES = ["eval.output=eval.json", "eval.results=results.jsonl"]
SMALL = ["steps=1", "num_prompts=4", "group_size=2", "log.tensorboard=false"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    asked = {
        "a run": (
            "grpo",
            [
                *EXACT,
                *SETS,
                *SMALL,
                "log.evaluations=true",
                "checkpoint.every=1",
                "checkpoint.best_metric=eval/cold/reward",
            ],
        )
    }
    for name, layout in TWO_RANK_LAYOUTS.items():
        asked[name] = ("evaluate", [*EXACT, *SETS, *FILES, *layout])
    return runs(tmp_path_factory.mktemp("evaluations"), 2, asked)


def folder(run: Run) -> Path:
    return run.path.parent


def test_any_layout_has_the_metrics_and_results_of_the_run_to_the_byte(made):
    run = made["a run"]
    results = (run.path / "evaluations" / "step-0.jsonl").read_bytes()
    logged = {name: v for name, v in run.metrics[0].items() if name.startswith("eval/")}
    for name in TWO_RANK_LAYOUTS:
        found = json.loads((folder(made[name]) / "eval.json").read_text())
        found.pop("intervals")
        assert found == logged
        assert (folder(made[name]) / "results.jsonl").read_bytes() == results
    assert {path.name for path in (run.path / "evaluations").iterdir()} == {
        "step-0.jsonl", "step-1.jsonl",
    }  # fmt: skip


def test_metrics_are_the_means_of_the_results(made):
    run = made["a run"]
    lines = (run.path / "evaluations" / "step-1.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    metrics = run.metrics[1]
    sizes = {"": (7, 3), "cold": (1, 3), "greedy": (7, 1), "sums": (7, 3)}
    for name, (prompts, samples) in sizes.items():
        own = [row for row in rows if row["set"] == name]
        prefix = f"eval/{name}" if name else "eval"
        assert [row["index"] for row in own] == list(range(prompts))
        assert {len(row["responses"]) for row in own} == {samples}
        for metric in own[0]["metrics"]:
            values = [row["metrics"][metric] for row in own]
            assert metrics[f"{prefix}/{metric}"] == pytest.approx(sum(values) / prompts, abs=1e-12)
    for row in rows:
        if row["set"] == "sums":
            assert all(length <= 3 for length in row["lengths"])
            assert all(text.find("3") in (-1, len(text) - 1) for text in row["responses"])
        else:
            right = [text.strip() == row["answer"] for text in row["responses"]]
            assert row["correct"] == right and row["votes"] == row["responses"]
    assert "step-" in str(next((run.path / "best").iterdir()))


def test_every_metric_is_shown_with_its_interval(made):
    shown = made["split"].output
    intervals = json.loads((folder(made["split"]) / "eval.json").read_text())["intervals"]
    assert "cold: 1 held-out prompts x 3 samples, model package:qwen3_tiny" in shown
    for name, (low, high) in intervals.items():
        assert f"[{low:.4f}, {high:.4f}]" in next(
            line for line in shown.splitlines() if line.startswith(f"  {name} ")
        )
