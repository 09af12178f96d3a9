"""Ctrl-C on the real recipes: what a stopped run leaves, and that nothing survives it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from foreground import Foreground, lines_of
from safetensors.torch import load_file

from mesh.config.schema import PACKAGE_DATA

SHIPPED = PACKAGE_DATA / "qwen3_tiny" / "model.safetensors"
SMALL = ["conf=qwen3_tiny", "eval.num_prompts=8", "eval.num_samples=1", "log.tensorboard=false"]
STEPS = 1000  # more than there is time for


def assert_stopped_and_saved(run_dir: Path, out: str) -> None:
    """`stopped n/m` with the run directory, metrics up to step n without gap, a whole model."""
    steps = [json.loads(line)["step"] for line in lines_of(run_dir / "metrics.jsonl")]
    assert steps == list(range(steps[-1] + 1))
    assert 1 <= steps[-1] < STEPS
    (line,) = [line for line in out.splitlines() if line.startswith("stopped")]
    assert f"stopped  {steps[-1]}/{STEPS} steps" in line
    assert line.endswith(f"run {run_dir}")
    saved, shipped = load_file(run_dir / "model" / "model.safetensors"), load_file(SHIPPED)
    assert {n: w.shape for n, w in saved.items()} == {n: w.shape for n, w in shipped.items()}
    assert any(not weight.equal(shipped[name]) for name, weight in saved.items())


def test_grpo_ends_after_the_step_with_its_model(tmp_path):
    run_dir = tmp_path / "run"
    words = [f"steps={STEPS}", "num_prompts=4", "group_size=2", f"run_dir={run_dir}"]
    job = Foreground("grpo.py", 2, *SMALL, *words)
    job.wait_for(lambda: len(lines_of(run_dir / "metrics.jsonl")) >= 3)
    out, err = job.press_ctrl_c()
    assert_stopped_and_saved(run_dir, out)
    last = len(lines_of(run_dir / "metrics.jsonl")) - 1
    assert f"to continue after step {last}: resume={run_dir}" in out
    assert [item.name for item in (run_dir / "checkpoints").glob("step-*")] == [f"step-{last}"]
    assert err.count("stopping at the end of this step; Ctrl-C again ends at once") == 1


def test_sigterm_leaves_a_checkpoint_and_status_0(tmp_path):
    run_dir = tmp_path / "run"
    words = [f"steps={STEPS}", "num_prompts=4", "group_size=2", f"run_dir={run_dir}"]
    job = Foreground("grpo.py", 1, *SMALL, *words)
    job.wait_for(lambda: len(lines_of(run_dir / "metrics.jsonl")) >= 3)
    job.popen.terminate()
    out, err = job.popen.communicate(timeout=60)
    assert job.popen.returncode == 0, err
    last = len(lines_of(run_dir / "metrics.jsonl")) - 1
    assert f"to continue after step {last}: resume={run_dir}" in out
    assert (run_dir / "checkpoints" / f"step-{last}" / "index.json").is_file()


def test_sft_ends_after_the_step_with_its_model(tmp_path):
    run_dir = tmp_path / "run"
    words = [f"sft.steps={STEPS}", "sft.batch_size=4", f"run_dir={run_dir}"]
    job = Foreground("sft.py", 1, *SMALL, *words)
    job.wait_for(lambda: len(lines_of(run_dir / "metrics.jsonl")) >= 3)
    out, _ = job.press_ctrl_c()
    assert_stopped_and_saved(run_dir, out)


@pytest.mark.parametrize(
    ("recipe", "num_ranks", "words"),
    [
        ("evaluate.py", 2, ["eval.num_prompts=512", "eval.num_samples=64"]),
        ("generate.py", 1, ["generate.prompts=-"]),
    ],
)
def test_what_saves_nothing_ends_at_once(recipe, num_ranks, words):
    reader, writer = os.pipe()  # a terminal at which nobody types
    job = Foreground(recipe, num_ranks, "conf=qwen3_tiny", *words, stdin=reader)
    job.wait_for(job.listens)
    out, err = job.press_ctrl_c()
    os.close(reader)
    os.close(writer)
    assert err.count("stopped: ended at once\n") == 1
    assert job.popen.returncode != 0
    assert out == ""
