"""When a run ends early, as a function of its evaluations; refusals. Runs that end so:
distributed/test_optimizer_runs.py.
"""

from __future__ import annotations

import json
import math

import pytest
from small_trainer import conf_of

from mesh.config.keys import override_problems
from mesh.config.sections import StopConf
from mesh.program.optimizer_checks import stop_problems
from mesh.runs.stopping import EarlyStop, early_stop, stop_reason


def ends_at(rule: StopConf, *values: float) -> int | None:
    """The first number of evaluations after which the run ends."""
    found = [(10 * i, value) for i, value in enumerate(values)]
    ends = (n for n in range(len(values) + 1) if stop_reason(rule, found[:n]))
    return next(ends, None)


def test_above_ends_it_where_it_is_reached():
    assert ends_at(StopConf(above=0.5), 0.1, 0.49, 0.5, 0.9) == 3
    assert ends_at(StopConf(above=0.5), 0.1, 0.4) is None
    assert ends_at(StopConf(), 0.1, 1.0, 0.0, 0.0, 0.0) is None


def test_after_counts_evaluations_that_do_not_exceed_the_best():
    """A tie is no improvement, and the first evaluation counts."""
    assert ends_at(StopConf(after=2), 0.5, 0.4, 0.5, 0.9) == 3
    assert ends_at(StopConf(after=2), 0.5, 0.4, 0.6, 0.6, 0.5) == 5
    assert ends_at(StopConf(after=1), 0.1, 0.2, 0.3) is None
    assert ends_at(StopConf(after=1), 0.1, 0.1) == 2


def test_what_is_not_finite_never_improves():
    assert ends_at(StopConf(after=2), 0.5, math.nan, math.inf, 0.9) == 3
    assert ends_at(StopConf(after=2), math.nan, 0.1, 0.2) is None
    assert ends_at(StopConf(above=0.5), math.nan, math.inf) is None


def test_the_reason_says_what_was_seen():
    values = [(0, 0.25), (10, 0.5), (20, 0.5), (30, 0.4)]
    assert stop_reason(StopConf(after=2), values) == (
        "eval/accuracy is 0.5 at step 10 and has not improved in 2 evaluations: stop.after=2"
    )
    rule = StopConf(metric="eval/reward", above=0.4)
    assert stop_reason(rule, values) == "eval/reward is 0.4 at step 30: stop.above=0.4"


def test_a_resumed_run_has_the_evaluations_of_its_log(process, tmp_path):
    """Bits of the values too, and what JSON has no number for."""
    values = {0: 0.1 + 0.2, 10: None, 20: 1 / 3}
    lines = [{"step": s, "loss": 0.5} | ({"eval/accuracy": values[s]} if s in values else {})
             for s in range(0, 25, 5)]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 25, "eval/acc'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = early_stop(StopConf(after=1), tmp_path, process, resume=True)
    live = EarlyStop(StopConf(after=1))
    for line in lines:
        live.see(line["step"], line | ({"eval/accuracy": math.nan} if line["step"] == 10 else {}))
    assert [found.values[i] for i in (0, 2)] == [(0, values[0]), (20, values[20])]
    assert math.isnan(found.values[1][1]) and found.reason == live.reason == ""
    assert early_stop(StopConf(), tmp_path, process, resume=False).values == []


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["stop.metric=eval/reward"], "stop.metric=eval/reward: nothing says when the run is to"),
        (["stop.after=2", "eval.every=0"], "stop.after=2: eval.every=0 evaluates after the last"),
        (["stop.above=1", "stop.metric=eval/rewards"], "stop.metric=eval/rewards: no evaluation"),
        (
            ["stop.above=90"],
            "stop.above=90.0: eval/accuracy is a share of 1, and never above 1; use 0.9",
        ),
        (
            ["stop.above=200"],
            "stop.above=200.0: eval/accuracy is a share of 1, and never above 1; use 1 ",
        ),
        (
            ["stop.above=2", "stop.metric=eval/pass@4"],
            "stop.above=2.0: eval/pass@4 is a share of 1, and never above 1; use 0.02",
        ),
        (
            ["stop.after=2", "stop.metric=-eval/response_length/mean"],
            "stop.metric=-eval/response_length/mean: it asks for the smallest value, and a run "
            "ends by one that is to grow; did you mean eval/response_length/mean? use one of",
        ),
    ],
    ids=str,
)
def test_what_would_end_no_run_is_refused(words, wrong):
    (line,) = stop_problems(conf_of("eval.every=5", *words))
    assert line.startswith(wrong)
    assert stop_problems(conf_of("eval.every=5", "stop.after=2", "stop.above=0.9")) == []


@pytest.mark.parametrize(
    "metric", ["eval/reward", "eval/reward/accuracy", "eval/response_length/mean"]
)
def test_what_is_no_share_may_end_a_run_above_1(metric):
    assert stop_problems(conf_of("eval.every=5", "stop.above=5", f"stop.metric={metric}")) == []


def test_a_resumed_run_may_end_elsewhere():
    saved = conf_of("stop.after=2")
    assert override_problems(saved, conf_of("stop.after=9", "stop.above=0.5")) == []
