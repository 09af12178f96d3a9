"""Trackers that fail or hang: the run goes on, says so once, and its own log is whole.

The `wandb` here stands in for W&B's service, which no test can reach.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from mesh.config.keys import Refusal
from mesh.config.sections import LogConf
from mesh.runs import feeds as feeds_module
from mesh.runs import metrics as metrics_module
from mesh.runs.metrics import MetricsLogger
from mesh.runs.samples import read_samples

BOTH, BOARD = LogConf(wandb="mine"), LogConf()
OURS = LogConf(tensorboard=False, wandb="mine")


class Service:
    """What `wandb.init` returns; raises in `fails`, and waits for `release` in `hangs`."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        self.fails, self.hangs, self.release = fails, hangs, threading.Event()
        self.logged: list[tuple[int, dict]] = []

    def call(self, name: str) -> None:
        if name == self.hangs:
            self.release.wait()
        if name == self.fails:
            raise ConnectionError("no route to host\nand more lines")

    def init(self, **words) -> Service:
        self.call("init")
        return self

    def log(self, values: dict, step: int, commit: bool) -> None:
        self.logged.append((step, values))
        self.call("log")

    def finish(self) -> None:
        self.call("finish")


def offered(monkeypatch, service: Service) -> Service:
    """Have `import wandb` give this service."""
    module = types.ModuleType("wandb")
    usage = type("UsageError", (Exception,), {})
    authentication = type("AuthenticationError", (Exception,), {})
    module.errors = types.SimpleNamespace(UsageError=usage, AuthenticationError=authentication)
    module.init = service.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return service


def logged(run_dir: Path, conf: LogConf, steps: int = 3) -> list[int]:
    with MetricsLogger(run_dir, conf, rank=0, steps=steps) as logger:
        for step in range(1, steps + 1):
            logger.log(step, {"loss": float(step)})
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]


@pytest.mark.parametrize(("where", "times"), [("init", 4), ("log", 3), ("finish", 1)])
def test_an_outage_is_a_warning_and_a_number_in_the_last_line(
    tmp_path, monkeypatch, capsys, where, times
):
    """Every step that it misses counts, and so does its start."""
    service = offered(monkeypatch, Service(fails=where))
    assert logged(tmp_path, OURS) == [1, 2, 3]
    out, err = capsys.readouterr()
    first = "ConnectionError: no route to host"
    expected = f"W&B failed ({first}); the run goes on, and metrics.jsonl has it all\n"
    assert err == expected
    plural = "s" if times > 1 else ""
    last = out.splitlines()[-1]
    assert f"  W&B failed {times} time{plural} ({first})  run {tmp_path}" in last
    assert len(service.logged) == (3 if where in ("log", "finish") else 0)


def test_samples_that_cannot_be_drawn_cost_the_tracker_its_table(tmp_path, monkeypatch, capsys):
    """The samples file has them, the tracker has the numbers, and the run goes on."""
    service = offered(monkeypatch, Service())
    row = {"split": "train", "set": "", "prompt_id": 0, "sample_id": 0, "reward": None}
    with MetricsLogger(tmp_path, OURS, rank=0, steps=2) as logger:
        for step in (1, 2):
            logger.log(step, {"loss": 1.0}, [row], {"reward": [1.0]})
            logger.mark().size(10)
    assert [found["step"] for found in read_samples(tmp_path)] == [1, 2]
    assert service.logged == [(1, {"loss": 1.0}), (2, {"loss": 1.0})]
    out, err = capsys.readouterr()
    assert err.count("W&B failed (TypeError: ") == 1 == len(err.splitlines())
    assert "W&B failed 2 times (" in out.splitlines()[-1]


def test_one_that_works_gets_every_step_and_nothing_is_said(tmp_path, monkeypatch, capsys):
    service = offered(monkeypatch, Service())
    assert logged(tmp_path, BOTH) == [1, 2, 3]
    assert service.logged == [(step, {"loss": float(step)}) for step in (1, 2, 3)]
    out, err = capsys.readouterr()
    assert err == "" and "failed" not in out


@pytest.mark.parametrize("where", ["log", "finish"])
def test_one_that_hangs_holds_up_nothing(tmp_path, monkeypatch, capsys, where):
    monkeypatch.setattr(metrics_module, "FINISH_SECONDS", 0.2)
    service = offered(monkeypatch, Service(hangs=where))
    assert logged(tmp_path, OURS) == [1, 2, 3]
    service.release.set()
    out, err = capsys.readouterr()
    assert err.count("W&B failed (RuntimeError: it did not finish within 0.2 s)") == 1
    assert "W&B failed 1 time (" in out


def test_one_that_is_far_behind_misses_steps_and_holds_up_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feeds_module, "WAITING", 2)
    monkeypatch.setattr(metrics_module, "FINISH_SECONDS", 0.2)
    service = offered(monkeypatch, Service(hangs="log"))
    run = threading.Thread(target=logged, args=(tmp_path, OURS, 9), daemon=True)
    run.start()
    run.join(20)
    held_up = run.is_alive()
    service.release.set()
    run.join()
    assert not held_up
    assert "W&B failed (RuntimeError: it is 2 steps behind)" in capsys.readouterr().err


def test_one_whose_start_hangs_holds_up_the_run_for_a_bounded_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feeds_module, "START_SECONDS", 0.2)
    monkeypatch.setattr(metrics_module, "FINISH_SECONDS", 0.2)
    service = offered(monkeypatch, Service(hangs="init"))
    began = time.monotonic()
    assert logged(tmp_path, OURS) == [1, 2, 3]
    assert time.monotonic() - began < 5
    service.release.set()
    out, err = capsys.readouterr()
    assert err.count("W&B failed (RuntimeError: it did not start within 0.2 s)") == 1
    assert "W&B failed 2 times (RuntimeError: it did not start within 0.2 s)  run " in out


def test_one_that_starts_late_gets_what_it_has_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(feeds_module, "START_SECONDS", 0.2)
    service = offered(monkeypatch, Service(hangs="init"))
    with MetricsLogger(tmp_path, OURS, rank=0, steps=2) as logger:
        logger.log(1, {"loss": 1.0})
        service.release.set()
        logger.log(2, {"loss": 2.0})
    assert service.logged == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]


def test_tensorboard_whose_directory_is_gone(tmp_path, capsys, monkeypatch):
    """Its own thread meets the error, and a later call raises it."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # that thread prints it too
    with MetricsLogger(tmp_path, BOARD, rank=0, steps=40) as logger:
        logger.log(1, {"loss": 1.0})
        shutil.rmtree(tmp_path / "tensorboard")
        for step in range(2, 41):
            logger.log(step, {"loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40
    out, err = capsys.readouterr()
    assert err.count("TensorBoard failed (") == 1
    assert "No such file or directory" in err
    assert "TensorBoard failed " in out.splitlines()[-1]


def test_tensorboard_that_cannot_begin(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    assert logged(tmp_path, BOARD) == [1, 2, 3]
    out, err = capsys.readouterr()
    assert err.count("TensorBoard failed (") == 1
    assert "TensorBoard failed 4 times (" in out.splitlines()[-1]


def test_what_the_user_has_to_do_is_refused_at_the_start(tmp_path, monkeypatch):
    service = offered(monkeypatch, Service())

    def init(**_) -> None:
        raise sys.modules["wandb"].errors.UsageError("No API key configured.")

    service.init = init
    sys.modules["wandb"].init = init
    with pytest.raises(Refusal, match=r"log.wandb=mine: W&B: No API key configured.; .*wandb log"):
        logged(tmp_path, OURS)


def test_metrics_that_cannot_be_written_still_end_the_run(tmp_path, monkeypatch):
    offered(monkeypatch, Service())
    with (
        pytest.raises(RuntimeError, match="cannot be written .No space left"),
        MetricsLogger(tmp_path, OURS, rank=0, steps=2) as logger,
    ):
        logger._metrics_file = open("/dev/full", "w")  # noqa: SIM115
        logger.log(1, {"loss": 1.0})
