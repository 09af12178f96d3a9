"""The report of runs with one name, and of runs whose ranks have different roles."""

from __future__ import annotations

import json
from pathlib import Path

from tests.report_runs import ENVIRONMENT, make_run
from tools.report.build import distinct, report_data
from tools.report.rank_findings import busy
from tools.report.timeline import RankStep, TimelineStep


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [Path("a/run"), Path("b/run"), Path("c/other"), Path("d/run")]
    assert distinct(paths) == ["a/run", "b/run", "other", "d/run"]
    assert distinct([Path("a/run"), Path("a/run"), Path("/")]) == ["a/run", "a/run (2)", ""]
    made = [make_run(tmp_path / name / "run", steps=2, prompts=1) for name in "ab"]
    assert [run["name"] for run in report_data(made)["runs"]] == ["a/run", "b/run"]


def test_starts_of_one_environment_are_no_difference_from_a_run_with_one(tmp_path):
    whole, resumed = (make_run(tmp_path / name, steps=2, prompts=1) for name in "ab")
    second = resumed / "environment-2.json"
    second.write_text(json.dumps(ENVIRONMENT | {"started": "2026-11-28", "changed": {}}))
    assert report_data([whole, resumed])["comparison"]["config"] == []
    second.write_text(json.dumps(ENVIRONMENT | {"packages": {"torch": "2.14.0"}}))
    assert report_data([whole, resumed])["comparison"]["config"] == [
        {"key": "Packages", "values": ["torch 2.13.0", "torch 2.13.0; then torch 2.14.0"]}
    ]


def test_a_rank_is_compared_with_ranks_that_have_the_same_work():
    """All ranks pass through every phase; off its role one has nothing to do in it."""
    events = (("generate", 0.0, 1.0, 0.25), ("train", 1.0, 2.0, 0.0))
    roles = ("trainer", "generator", "both")
    ranks = tuple(RankStep(rank, role, events) for rank, role in enumerate(roles))
    found = busy([TimelineStep(step, ranks) for step in (1, 2)])
    assert found == {"generate": {1: 1.5, 2: 1.5}, "train": {0: 2.0, 2: 2.0}}
