"""The report of runs with one name, and of runs whose ranks have different roles."""

from __future__ import annotations

from pathlib import Path

from tests.report_runs import make_run
from tools.report.build import distinct, report_data
from tools.report.rank_findings import busy
from tools.report.timeline import RankStep, TimelineStep


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [Path("a/run"), Path("b/run"), Path("c/other"), Path("d/run")]
    assert distinct(paths) == ["run", "run (2)", "other", "run (3)"]
    made = [make_run(tmp_path / name / "run", steps=2, prompts=1) for name in "ab"]
    assert [run["name"] for run in report_data(made)["runs"]] == ["run", "run (2)"]


def test_a_rank_is_compared_with_ranks_that_have_the_same_work():
    """All ranks pass through every phase; off its role one has nothing to do in it."""
    events = (("generate", 0.0, 1.0, 0.25), ("train", 1.0, 2.0, 0.0))
    roles = ("trainer", "generator", "both")
    ranks = tuple(RankStep(rank, role, events) for rank, role in enumerate(roles))
    found = busy([TimelineStep(step, ranks) for step in (1, 2)])
    assert found == {"generate": {1: 1.5, 2: 1.5}, "train": {0: 2.0, 2: 2.0}}
