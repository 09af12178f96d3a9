"""The log of a run and its progress display, value by value."""

import json
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mesh.config.sections import LogConf
from mesh.lifecycle.timers import Phases
from mesh.runs.metrics import MetricsLogger
from mesh.runs.progress import Pace, clock, packed, plain_line, thousands

QUIET = LogConf(tensorboard=False)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_file(tmp_path):
    with MetricsLogger(tmp_path, QUIET, rank=0, steps=2) as metrics:
        metrics.log(1, {"reward/mean": torch.tensor(0.5), "loss": np.float32(0.25)})
        assert len(lines(tmp_path / "metrics.jsonl")) == 1  # flushed at once
        metrics.log(2, {"loss": float("nan"), "grad_norm": float("inf"), "digest/weights": "ff"})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.25, "reward/mean": 0.5}\n'
        '{"step": 2, "digest/weights": "ff", "grad_norm": null, "loss": null}\n'
    )


def test_a_second_logger_appends(tmp_path, capsys):
    for step in (1, 2):
        with MetricsLogger(tmp_path, QUIET, rank=0, steps=2) as metrics:
            metrics.log(step, {"loss": step})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "s/step  ETA 0:00" in capsys.readouterr().out


def test_off_rank_0_nothing_happens(tmp_path, capsys):
    with MetricsLogger(tmp_path, LogConf(), rank=1, steps=2) as metrics:
        metrics.log(1, {"loss": 1.0}, [{"prompt": "a"}])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard(tmp_path):
    with MetricsLogger(tmp_path, LogConf(), rank=0, steps=2) as metrics:
        metrics.log(1, {"loss": 0.5, "digest/weights": "ff"})
        metrics.log(2, {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Tags()["scalars"] == ["loss"]


def test_wandb_offline_without_its_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    conf = LogConf(tensorboard=False, wandb="project")
    with MetricsLogger(tmp_path, conf, rank=0, steps=1, config={"seed": 3}) as metrics:
        metrics.log(1, {"loss": 0.5})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert not any(key.encode() in path.read_bytes() for path in written)


def fake_pace(steps: int, seconds_per_step: float, step: int) -> Pace:
    times = iter([0.0] + [seconds_per_step * i for i in range(1, step + 1)] + [99.0] * 99)
    pace = Pace(steps, now=lambda: next(times))
    for done in range(1, step + 1):
        pace.advance(done)
    return pace


METRICS = {
    "reward/mean": 0.5312,
    "eval/accuracy": 0.48,
    "logprob_diff/max": 0.0,
    "tokens_per_second/generate": 12345.0,
    "tokens_per_second/train": 45600.0,
    "loss": 1.0,
}


def test_plain_line():
    assert plain_line(METRICS, fake_pace(150, 0.82, 12)) == (
        "step   12/150  reward 0.531  eval 0.480  logprob_diff 0.0e+00  gen 12.3k tok/s"
        "  train 45.6k tok/s  0.82 s/step  ETA 1:53"
    )
    more = {"reward/mean": 0.5, "response/truncated": 0.125, "steps_without_signal": 3.0}
    more |= {"response_length/mean": 5.06, "entropy": 1.25, "eval/accuracy": 0.48}
    assert plain_line(more, fake_pace(150, 1.0, 0)) == (
        "step    0/150  reward 0.500  length 5.1  truncated 12%  entropy 1.250  eval 0.480  "
        "no signal 3  ? s/step  ETA ?"
    )
    taught = {"loss": 0.75, "eval/accuracy": None}  # a log has null where JSON lacks the number
    assert (
        plain_line(taught, fake_pace(150, 1.0, 0)) == "step    0/150  loss 0.750  ? s/step  ETA ?"
    )
    none = more | {"steps_without_signal": 0.0}
    parts = {f"reward/{name}": 0.25 for name in ("mean", "std", "failed", "d", "b", "a", "c")}
    assert plain_line(parts, fake_pace(150, 1.0, 0)) == (
        "step    0/150  reward 0.250  reward/a 0.250  reward/b 0.250  reward/c 0.250  ? s/step  "
        "ETA ?"
    )
    assert "no signal" not in plain_line(none, fake_pace(150, 1.0, 0))
    assert plain_line({}, fake_pace(150, 1.0, 0)) == "step    0/150  ? s/step  ETA ?"


def test_pace_is_that_of_the_last_steps():
    times = iter([0.0, *(100.0 + i for i in range(1, 31))])
    pace = Pace(60, now=lambda: next(times))
    for step in range(1, 31):
        pace.advance(step)
    assert pace.seconds_per_step() == 1.0
    assert pace.eta() == "0:30"


def test_pace_of_a_resumed_run():
    times = iter([0.0, 2.0])
    pace = Pace(100, now=lambda: next(times), step=90)
    pace.advance(91)
    assert pace.seconds_per_step() == 2.0
    assert pace.eta() == "0:18"


def test_numbers_for_people():
    assert [clock(s) for s in (6.6, 113, 7389)] == ["0:07", "1:53", "2:03:09"]
    assert [thousands(n) for n in (950, 12345, 4.56e6)] == ["950", "12.3k", "4.56M"]


def test_lines_and_summary_where_stdout_is_no_terminal(tmp_path, capsys):
    with MetricsLogger(tmp_path, QUIET, rank=0, steps=3) as metrics:
        metrics.log(1, METRICS)
        metrics.log(2, {"reward/mean": 0.6})
    named, first, second, summary = capsys.readouterr().out.splitlines()
    assert named == f"run {tmp_path}"
    assert first.startswith("step    1/3  reward 0.531  eval 0.480")
    assert second.startswith("step    2/3  reward 0.600  eval 0.480")  # the last one measured
    assert "tok/s" not in second
    assert summary == f"stopped  2/3 steps  eval 0.480  wall 0:00  run {tmp_path}"
    assert capsys.readouterr().out == ""


def test_no_summary_after_an_error(tmp_path, capsys):
    with pytest.raises(KeyError), MetricsLogger(tmp_path, QUIET, rank=0, steps=1):
        raise KeyError
    assert capsys.readouterr().out == f"run {tmp_path}\n"


def test_a_row_is_as_full_as_it_can_be_and_a_wide_item_has_its_own():
    assert packed([4, 4, 4], 16) == [range(3)]
    assert packed([4, 4, 4], 15) == [range(2), range(2, 3)]
    assert packed([4, 40, 4, 4], 10) == [range(1), range(1, 2), range(2, 4)]
    assert packed([], 10) == []


def test_phases_accumulate_and_start_over():
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        with phases("generate"):
            time.sleep(0.02)
    with pytest.raises(KeyError), phases("train"):
        time.sleep(0.01)
        raise KeyError
    seconds = phases.seconds()
    assert list(seconds) == ["generate", "train"]
    assert 0.04 <= seconds["generate"] < 0.4
    assert 0.01 <= seconds["train"] < 0.2
    assert phases.seconds() == {}
