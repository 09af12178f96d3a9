"""The learning table of tools.bench.losses: its runs, its rows, and what it says of failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh.config.loading import load_conf
from tools.bench.losses import REWARDED, Curve, Trial, curve_of, missed, read_words, table_of, whole

RISING = ((0, 0.25), (10, 0.5), (20, 0.81), (30, 0.79))


def test_a_run_is_written_as_a_user_would():
    trial = Trial("gspo", 4, 2)
    command = trial.command(["steps=30"], Path("/runs/x"))
    words = command[command.index("conf=qwen3_tiny") :]
    _, conf = load_conf(words)
    assert (conf.loss, conf.seed, conf.updates_per_step, conf.steps) == ("gspo", 2, 4, 30)
    assert conf.run_dir == "/runs/x" and trial.name == "gspo-u4-s2"
    assert not [w for w in Trial("gspo", 1, 0).command([], Path("x")) if "updates" in w]


def test_options_are_ours_and_the_rest_is_the_recipes():
    options, words = read_words(["losses=rloo", "updates=1,4", "steps=9", "jobs=3", "output=/o"])
    assert (options["losses"], options["jobs"], words) == ("rloo", "3", ["steps=9"])
    assert read_words(["output=/o"])[0]["losses"] == ",".join(REWARDED)
    for wrong in ("seeds=no", "updates=1,0", "jobs=0"):
        with pytest.raises(SystemExit):
            read_words([wrong])


def test_a_row_has_the_first_step_at_the_target_and_the_last_accuracy_of_each_seed():
    flat = ((0, 0.35), (30, 0.4))
    curves = [
        Curve(Trial("rloo", 1, 0), RISING), Curve(Trial("rloo", 1, 1), flat),
        Curve(Trial("rloo", 4, 0), ()),
    ]  # fmt: skip
    rows = table_of(curves, 0.8)
    assert rows[0].startswith("| loss | updates | start | steps to 0.8, by seed |")
    assert rows[2:] == [
        "| `rloo` | 1 | 0.300 | 20, - | 0.790, 0.400 |", "| `rloo` | 4 | - | - | failed |",
    ]  # fmt: skip
    assert [missed(curve, 0.8) for curve in curves] == [False, True, True]
    assert not missed(Curve(Trial("rloo", 4, 1), flat), 0.8)  # only one update has to reach it


def test_a_run_that_is_there_is_read(tmp_path):
    """Only where it is whole: its last line is that of its last step."""
    trial = Trial("dapo", 1, 0)
    (tmp_path / trial.name / "model").mkdir(parents=True)
    lines = [{"step": step, "eval/accuracy": value} for step, value in RISING]
    lines.insert(1, {"step": 5, "loss": 0.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / trial.name / "metrics.jsonl").write_text(text)
    (tmp_path / trial.name / "config.yaml").write_text("steps: 30\n")
    curve = curve_of(trial, [], tmp_path)
    assert curve == Curve(trial, RISING) and curve.reached(0.5) == 10
    (tmp_path / trial.name / "config.yaml").write_text("steps: 31\n")
    assert not whole(tmp_path / trial.name) and not whole(tmp_path / "none")
