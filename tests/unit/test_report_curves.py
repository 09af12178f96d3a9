"""The curves of a report: every number in one chart, thinned without losing its shape."""

from __future__ import annotations

import json
import math

import pytest
from report_runs import make_run

from tools.report.build import report_data
from tools.report.charts import chart_of
from tools.report.curves import points_of
from tools.report.headline import is_done
from tools.report.intervals import wilson
from tools.report.reading import Run, read_run
from tools.report.thinning import evenly, rounded, spread, thinned
from tools.report.timeline import timeline_of, timeline_steps


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run", steps=30, tokens=4, metrics=3)


def test_every_number_is_in_one_curve_with_its_points(run_dir):
    data = report_data([run_dir])["runs"][0]
    held: dict[str, dict[int, float]] = {}
    for curve in [*data["curves"], *data["speed"]["curves"]]:
        for series in curve["series"]:
            assert series["key"] not in held, "a metric is in one chart"
            held[series["key"]] = dict(zip(series["steps"], series["values"], strict=True))
    wanted: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        for key, value in line.items():
            if key != "step" and not isinstance(value, str):
                wanted.setdefault(key, {})[line["step"]] = value
    phases = {key for key in wanted if key.startswith("seconds/")} - {"seconds/sync"}
    assert held.keys() == wanted.keys() - phases
    for key in held:
        assert held[key] == pytest.approx(wanted[key], rel=1e-5), key
    assert set(data["speed"]["phases"]["names"]) == {key[8:] for key in wanted if "seconds/" in key}
    assert data["speed"]["phases"]["seconds"]["eval"][:11] == [0.5, *[0] * 9, 0.5]


@pytest.mark.parametrize(
    ("metric", "group", "chart", "label"),
    [
        ("reward/mean", "Reward", "reward", "mean"),
        ("reward/format", "Reward", "reward-parts", "format"),
        ("eval/accuracy", "Evaluation", "eval-accuracy", "accuracy"),
        ("eval/hard/accuracy_greedy", "Evaluation", "eval-hard-accuracy", "accuracy_greedy"),
        ("eval/hard/reward/format", "Evaluation", "eval-hard-reward", "reward/format"),
        ("eval/reward/format", "Evaluation", "eval-reward", "reward/format"),
        ("eval/hard/pass@4", "Evaluation", "eval-hard-accuracy", "pass@4"),
        ("eval/response/truncated", "Evaluation", "eval-truncated", "truncated"),
        ("eval/response_length/mean", "Evaluation", "eval-length", "mean"),
        ("eval/failed", "Evaluation", "eval-other", "failed"),
        ("update/2/approx_kl", "Policy", "approx-kl", "update 2"),
        ("tokens_per_second/train", "Rates", "tokens-per-second", "train"),
        ("difficulty/waived", "Prompts and groups", "difficulty", "waived"),
        ("my metric", "Other metrics", "other-my-metric", "my metric"),
    ],
)
def test_a_metric_has_its_chart(metric, group, chart, label):
    found, line = chart_of(metric)
    assert (found.group, found.id, line) == (group, chart, label)


def test_thinning_keeps_ends_extremes_and_gaps():
    values = [math.sin(i / 50) for i in range(5000)]
    values[1234], values[2345], values[3456] = 9.0, -9.0, None
    kept = thinned(values, 200)
    assert len(kept) <= 200 and kept == sorted(set(kept))
    assert {0, 4999, 1234, 2345, 3456} <= set(kept)
    assert thinned(values[:100], 200) == [*range(100)]
    assert len(thinned([None] * 500, 30)) <= 30


def test_evenly_and_spread_keep_the_ends():
    assert evenly([*range(10)], 4) == [0, 3, 6, 9] and evenly([1, 2], 5) == [1, 2]
    assert evenly([1, 2, 3], 1) == [3] and evenly([], 4) == []
    order = spread([*range(17)])
    assert order[:5] == [0, 16, 8, 4, 12] and sorted(order) == [*range(17)]
    assert spread([]) == [] and spread([7]) == [7] and spread([1, 2]) == [1, 2]


def test_numbers_are_short_and_right():
    assert [rounded(x) for x in (0.123456, 12345.0, -3e-7, 0.0, 2.0)] == [
        0.123, 12300, -3e-07, 0, 2]  # fmt: skip
    assert json.dumps(rounded(2.0)) == "2"


def test_wilsons_interval_is_the_published_one():
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_intervals_of_evaluations_are_those_of_their_problems(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=10, prompts=0, words=("eval.num_prompts=40",))
    folder = run_dir / "evaluations"
    folder.mkdir()
    rows = [{"set": "", "metrics": {"accuracy": float(i % 2), "reward": 1.0 * i}} for i in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "damaged\n"
    (folder / "step-10.jsonl").write_text(text)
    curves = report_data([run_dir])["runs"][0]["curves"]
    series = {s["key"]: s for c in curves for s in c["series"]}
    accuracy, reward = series["eval/accuracy"], series["eval/reward"]
    half = 1.959964 * (8 / 7 * 0.25 / 8) ** 0.5  # the standard error of four 0 and four 1
    assert accuracy["high"][1] - accuracy["values"][1] == pytest.approx(half, abs=1e-5)
    assert (accuracy["low"][0], accuracy["high"][0]) == pytest.approx(wilson(0.2, 40), abs=1e-5)
    assert reward["low"][0] is None and reward["high"][1] is not None
    assert "low" not in series["reward/mean"]


def test_a_page_of_many_runs_and_metrics_has_few_points(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=300, prompts=0, metrics=150)
    run = read_run(run_dir)
    assert len(points_of(run)) > 150
    data = report_data([run_dir, run_dir])
    sizes = [len(s["steps"]) for r in data["runs"] for c in r["curves"] for s in c["series"]]
    assert sum(sizes) <= 60_000 and min(sizes) >= 8 and max(sizes) < 301


def test_a_timeline_is_thinned_by_whole_steps(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=500, prompts=0))
    drawn = timeline_of(timeline_steps(run))
    assert drawn["ranks"] == [{"rank": 0, "role": "trainer"}, {"rank": 1, "role": "generator"}]
    assert len(drawn["steps"]) == 60 and drawn["left_out"] == 440
    assert [drawn["steps"][0]["step"], drawn["steps"][-1]["step"]] == [1, 500]
    assert drawn["steps"][0]["seconds"] == 0.73
    assert drawn["steps"][0]["ranks"][0][1] == ["exchange", 0.0, 0.31, 0.3]


def test_a_run_is_done_when_its_steps_are_made(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=4, prompts=0)
    (run_dir / "model").rmdir()
    assert is_done(read_run(run_dir))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert not is_done(read_run(run_dir))
    headline = report_data([run_dir])["runs"][0]["headline"]
    assert "3 of 4 steps" in headline["sentence"]
    (run_dir / "model").mkdir()  # it was stopped, and left its model
    assert is_done(read_run(run_dir))


def test_a_run_that_logged_nothing_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    data = report_data([tmp_path])["runs"][0]
    assert data["curves"] == [] and not data["done"] and data["headline"]["sentence"]
    assert read_run(tmp_path).steps == 0 == Run(tmp_path).steps
