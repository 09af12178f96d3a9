"""The headline of a report: the steps that were asked for, and the time that they took."""

from __future__ import annotations

import json

import pytest
from report_runs import ENVIRONMENT, make_run

from tools.report.build import report_data


def headline_of(run_dir):
    return report_data([run_dir])["runs"][0]["headline"]


def facts_of(run_dir):
    return {fact["label"]: fact for fact in headline_of(run_dir)["facts"]}


@pytest.mark.parametrize(
    ("later", "shown", "note"),
    [
        ({"changed": {"steps": "3"}}, "3", "done"),
        ({"changed": {}, "command": "python a.py steps=3"}, "3 of 1,000", "not finished"),
        ({"command": "python a.py steps=3"}, "3", "done"),  # an older version's
        ({"changed": "damaged"}, "3 of 1,000", "not finished"),
    ],
)
def test_a_resumed_run_has_the_steps_of_its_last_start(tmp_path, later, shown, note):
    run_dir = make_run(tmp_path / "run", steps=3, words=("steps=1000",))
    (run_dir / "model").rmdir()
    (run_dir / "environment-2.json").write_text(json.dumps(ENVIRONMENT | later))
    fact = facts_of(run_dir)["Steps"]
    assert (fact["value"], fact["note"]) == (shown, note)
    assert headline_of(run_dir)["sentence"].endswith(f", {shown} steps.")


def test_what_a_later_start_changed_stands_beside_what_the_first_had(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=3, words=("steps=1000",))
    later = {"changed": {"steps": "100", "log.samples": "0"}, "python": "3.12.0"}
    (run_dir / "environment-2.json").write_text(json.dumps(ENVIRONMENT | later))
    data = report_data([run_dir])["runs"][0]
    config = {row["key"]: row for row in data["config"]}
    steps = config["steps"]
    assert (steps["value"], steps["earlier"], steps["changed"]) == ("100", "1000", False)
    assert (config["log.samples"]["value"], config["log.samples"]["changed"]) == ("0", True)
    assert "earlier" not in config["seed"]
    rows = [(row["label"], row["value"]) for row in data["environment"]]
    assert rows[-3:] == [
        ("Start 2: Python", "3.12.0"),
        ("Start 2: Changed keys", "steps=100, log.samples=0"),
        ("Start 2: As before", "Started, Command, Commit, Platform, CPU, CPU cores, Ranks, "
         "Packages, Variables, Rank 0, Rank 1"),
    ]  # fmt: skip


def test_speed_is_told_in_the_order_of_a_step_and_in_units_that_fit(tmp_path):
    facts = report_data([make_run(tmp_path / "run", steps=12)])["runs"][0]["speed"]["facts"]
    assert [(fact["label"], fact["value"]) for fact in facts] == [
        ("Time of generate", "0.3 s"),
        ("Time of exchange", "10 ms"),
        ("Time of train", "0.4 s"),
        ("Time of sync", "20 ms"),
        ("Time of eval", "0.5 s"),
        ("Throughput of generate", "8,500 tokens/s"),
        ("Throughput of train", "6,400 tokens/s"),
        ("Size of a sync", "2 MB"),
        ("Rate of a sync", "0.1 GB/s"),
        ("Host memory", "1.2 GB"),
    ]


def test_a_run_that_was_asked_to_end_did_not_make_its_steps(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=3, words=("steps=1000",))
    fact = facts_of(run_dir)["Steps"]
    assert (fact["value"], fact["note"]) == ("3 of 1,000", "ended early, final model saved")


def test_phases_that_ranks_run_at_once_count_once(tmp_path):
    """The trainer of these steps waits in `exchange` while the generator generates: 0.73 s each.
    Step 0 is not in the timeline, and its evaluation takes 0.5 s."""
    run_dir = make_run(tmp_path / "run", steps=9)
    fact = facts_of(run_dir)["Wall time"]
    assert fact["value"] == "7.1 s"
    assert fact["note"] == "all logged steps, 0.79 s a step, at most: the sum of their phases"
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[1:]))
    fact = facts_of(run_dir)["Wall time"]
    assert (fact["value"], fact["note"]) == ("6.6 s", "all logged steps, 0.73 s a step")


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (("model.path=null", "model.flavor=0.6B"), "random weights"),
        (("model.path=/m/Smol",), "/m/Smol"),
        (("model.path=/m/Smol", "model.init=random"), "random weights, shape of /m/Smol"),
    ],
)
def test_the_model_says_where_its_weights_came_from(tmp_path, words, note):
    assert facts_of(make_run(tmp_path / "run", steps=3, words=words))["Model"]["note"] == note
