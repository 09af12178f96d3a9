"""Evaluation of a model of a run: keys that differ from that run's are warned about, once each."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.config.loading import load_conf, save_conf
from mesh.config.schema import PACKAGE_DATA
from mesh.lifecycle.process import Process
from mesh.program.assembly import check
from mesh.program.warnings import other_run_warnings
from mesh.recipes.generate import deciding_keys

OWN = ["task_args.max_length=7", "generator.temperature=0.4", "seed=3", "eval.num_samples=2"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with keys of its own, which says explicitly what others leave to the defaults."""
    path = tmp_path_factory.mktemp("of_a_run") / "run"
    for place in ("model", "best/step-3"):
        shutil.copytree(PACKAGE_DATA / "qwen3_tiny", path / place)
    words = [*OWN, "task_args.min_length=3", "generator.dtype=float32", "vllm.model=native"]
    save_conf(load_conf(["conf=qwen3_tiny", *words, "steps=3"])[1], path / "config.yaml")
    return path


def warned(process: Process, path: Path, *words: str, generates: bool = False) -> list[str]:
    conf = load_conf(["conf=qwen3_tiny", f"model.path={path}", *words])[1]
    plan = check(conf, replace(process, world_size=1), training=False)
    return other_run_warnings(conf, plan, *([deciding_keys(conf)] if generates else []))


@pytest.mark.parametrize("place", ["model", "best/step-3"])
def test_every_key_that_differs_is_named_with_both_values(process, run_dir, place):
    (line,) = warned(process, run_dir / place, "eval.num_samples=2", "generator.max_new_tokens=9")
    assert line == (
        f"warning: model.path={run_dir / place} is of a run with other keys, so results do not "
        "compare with its own: seed=0 (the run: 3), generator.temperature=1.0 (the run: 0.4), "
        "generator.max_new_tokens=9 (the run: 8), task_args.max_length=5 (the run: 7); start with "
        f"conf={run_dir / 'config.yaml'} to have those of the run"
    )


def test_nothing_is_said_where_nothing_differs(process, run_dir, tmp_path):
    assert warned(process, run_dir / "model", *OWN) == []
    assert warned(process, run_dir / "model", *OWN, "trainer.lr=1", "run_dir=x", "waves=2") == []
    conf = load_conf([f"conf={run_dir / 'config.yaml'}", f"model.path={run_dir / 'model'}"])[1]
    assert other_run_warnings(conf, check(conf, process, training=False)) == []
    shutil.copytree(PACKAGE_DATA / "qwen3_tiny", tmp_path / "model")
    assert warned(process, tmp_path / "model") == []  # of no run
    assert warned(process, run_dir / "model", "model.init=random") == []


def test_answers_depend_on_fewer_keys(process, run_dir):
    model, asks = run_dir / "model", "generate.prompts=[abc>]"
    assert warned(process, model, asks, generates=True) == []
    (line,) = warned(process, model, asks, "generate.greedy=false", generates=True)
    assert "seed=0 (the run: 3)" in line and "task_args" not in line and "eval." not in line
    (line,) = warned(process, model, generates=True)
    assert "own: task_args.max_length=5 (the run: 7); start" in line


def test_another_task_and_a_file_that_cannot_be_read_are_said(process, run_dir, tmp_path):
    (line,) = warned(process, run_dir / "model", *OWN[1:], "task=user_tasks:Weighted")
    assert "task=user_tasks:Weighted (the run: spell_backward)" in line
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("stepps: 3\n")
    (line,) = warned(process, tmp_path / "run" / "model")
    assert "cannot be compared with: " in line and "stepps=3: unknown key" in line
