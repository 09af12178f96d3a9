"""Runs with averaged weights, and runs that end early: two ranks, one launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import Run, runs
from safetensors.torch import load_file

from mesh.model.families import TINY
from mesh.model.hf import hf_names
from mesh.model.layouts import weight_names
from mesh.runs.compare import untimed

RUN = [
    "conf=qwen3_tiny", "num_prompts=16", "group_size=4", "steps=3", "eval.every=2",
    "eval.num_prompts=64", "eval.num_samples=1", "log.tensorboard=false", "batch_invariant=true",
    "trainer.lr=3e-4", "trainer.warmup_steps=0", "log.samples=-1",
]  # fmt: skip
EMA = ["ema=0.9", "checkpoint.every=2"]
STOP = [*RUN, "steps=9", "eval.every=1", "stop.metric=eval/reward"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict[str, Run]:
    root: Path = tmp_path_factory.mktemp("optimizer")
    run_dir = root / "averaged" / "run"
    evaluation = ["conf=qwen3_tiny", *RUN[5:9], f"model.path={run_dir}/model", "eval.output=e.json"]
    asked = {
        "plain": ("grpo", RUN),
        "averaged": ("grpo", [*RUN, *EMA]),
        "split": ("grpo", [*RUN, *EMA, "mesh.mode=split"]),
        "evaluated": ("evaluate", evaluation),
        "replayed": ("replay", [str(run_dir), "step=3"]),
        "resumed": ("grpo", [f"resume={run_dir}", "steps=4", "eval.every=1"]),
        "above": ("grpo", [*STOP, "stop.above=-99", "checkpoint.every=5"]),
        "after": ("grpo", [*STOP, "stop.after=1", "trainer.lr=1e-12", "checkpoint.every=5"]),
        "again": ("grpo", [f"resume={root / 'after' / 'run'}"]),
        "further": ("grpo", [f"resume={root / 'after' / 'run'}", "stop.after=2"]),
    }
    return runs(root, 2, asked)


def of_kind(run: Run, evaluated: bool) -> list[dict]:
    return [
        {k: v for k, v in untimed(line).items() if k.startswith("eval/") == evaluated}
        for line in run.metrics
    ]


def test_the_average_changes_evaluations_and_nothing_else(launched):
    """The newest weights go back to the generator: it draws the next steps' tokens from them."""
    plain, averaged = launched["plain"], launched["averaged"]
    assert of_kind(plain, False) == of_kind(averaged, False)[:4] and len(plain.metrics) == 4
    assert plain.samples == [s for s in averaged.samples if s["step"] <= 3]
    mine, theirs = of_kind(averaged, True), of_kind(plain, True)
    assert mine[0] == theirs[0] and mine[2] != theirs[2] and mine[3] != theirs[3]
    assert all(line["logprob_diff/max"] == 0 for line in averaged.metrics[1:])


def test_the_exported_model_and_the_checkpoint_have_the_same_average(launched):
    """Split, so that one rank trains, and its file holds everything."""
    path = launched["split"].path
    stored = load_file(path / "checkpoints" / "step-3" / "rank-0.safetensors")
    exported = load_file(path / "model" / "model.safetensors")
    kinds = {"weights": 0, "ema": 0}
    for name, theirs in hf_names(sorted(weight_names(TINY)), TINY).items():
        for kind in kinds:
            mine = stored.get(f"{kind}/{name}")
            kinds[kind] += mine is not None and torch.equal(mine, exported[theirs])
    assert kinds["weights"] == 0 and kinds["ema"] == len(exported) > 20
    first, second = launched["split"].metrics, launched["averaged"].metrics
    assert {k: v for k, v in first[0].items() if k.startswith("eval/")} == {
        k: v for k, v in second[0].items() if k.startswith("eval/")
    }


def test_the_exported_model_answers_as_the_last_evaluation_did(launched):
    evaluated = json.loads((launched["evaluated"].path.parent / "e.json").read_text())
    del evaluated["intervals"]
    last = launched["averaged"].metrics[3]
    assert evaluated == {k: v for k, v in last.items() if k.startswith("eval/")} and evaluated


def test_a_replay_and_a_resume_have_the_average(launched):
    assert launched["replayed"].output.splitlines()[-1].startswith("equal to the bit: ")
    assert "eval/reward" in launched["replayed"].output
    assert "the digests of weights and moments match" in launched["resumed"].output


def test_a_metric_that_is_reached_ends_the_run_as_its_last_step_does(launched):
    """Before the first step here: the evaluation of the start is enough."""
    made = launched["above"]
    assert "the run ends here: eval/reward is" in made.output and "stop.above=-99" in made.output
    assert [line["step"] for line in made.metrics] == [0]
    assert (made.path / "model" / "model.safetensors").is_file()


def test_patience_ends_the_run_with_a_model_and_a_checkpoint(launched):
    """Weights that hardly move give equal evaluations."""
    made = launched["after"]
    assert "at step 0 and has not improved in 1 evaluations: stop.after=1" in made.output
    assert "to continue after" not in made.output
    assert (made.path / "model" / "model.safetensors").is_file()
    assert "resumed from" in launched["again"].output


def test_a_run_that_has_ended_early_goes_on_only_where_it_may(launched):
    """The second resume may take one step more, and its log shows that the first took none."""
    again, further = launched["again"].output, launched["further"].output
    assert "checkpoints/step-1: the digests" in again and "stop.after=1" in again
    assert "checkpoints/step-1: the digests" in further
    assert "at step 0 and has not improved in 2 evaluations: stop.after=2" in further
    after = launched["after"]
    assert [line["step"] for line in after.metrics] == [0, 1, 2]
    assert {item.name for item in (after.path / "checkpoints").glob("step-*")} == {
        "step-1",
        "step-2",
    }
