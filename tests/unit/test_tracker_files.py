"""TensorBoard, W&B (offline) and trackio (local) themselves: what they have of a run is right,
also of one that was resumed. Five seconds."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mesh.config.keys import Refusal
from mesh.config.sections import LogConf
from mesh.runs.excerpts import COLUMNS
from mesh.runs.feeds import Trackers
from mesh.runs.trackers import Entry

LENGTHS, REWARDS = [3, 5, 5, 20], [0.0, 1.0, 1.0, 0.25]
TEXT = "<script>alert(1)</script> \ud800 ![a](http://a/b.png)"
SHOWN = TEXT.replace("\ud800", "\\ud800")
BOARD = LogConf()
WANDB = LogConf(tensorboard=False, wandb="a-project")
TRACKIO = LogConf(tensorboard=False, trackio="a-project")
ALL = {"tensors": 0, "histograms": 0}  # none of them is left out
SECRET = "only-the-judge-may-know"
TOKEN = "hf_0123456789abcdefghijABCDEFGHIJ0123"


def entry(step: int, offset: float = 0.0) -> Entry:
    rows = [
        {
            "step": step, "split": "train", "chosen": "best", "prompt_id": 2, "sample_id": sample,
            "prompt": "1+1", "response": TEXT, "reward": reward, "length": length,
            "finish_reason": "stop", "advantage": reward - 0.5,
        }
        for sample, (length, reward) in enumerate(zip(LENGTHS, REWARDS, strict=True))
    ]  # fmt: skip
    histograms = {"response_length": LENGTHS, "reward": [*REWARDS, float("nan")]}
    return Entry({"loss": step / 4 + offset, "not/finite": float("nan")}, histograms, rows)


def run(run_dir: Path, conf: LogConf, first: int, last: int, offset: float = 0.0) -> None:
    """A run's steps after `first`, as a process of their own would log them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    trackers = Trackers(run_dir, conf, 5, {"seed": 3, "task_args": {"api_key": SECRET}}, first)
    for step in range(first + 1 if first else 0, last + 1):
        trackers.log(step, entry(step, offset))
    trackers.close(60)
    assert trackers.summaries() == []


def test_tensorboard_has_scalars_histograms_and_samples(tmp_path):
    run(tmp_path, BOARD, 0, 5)
    events = EventAccumulator(str(tmp_path / "tensorboard"), ALL).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, s / 4) for s in range(6)]
    for name, values in (("response_length", LENGTHS), ("reward", REWARDS)):
        assert [e.step for e in events.Histograms(name)] == list(range(6))
        held = events.Histograms(name)[-1].histogram_value
        assert (held.num, held.min, held.max) == (4, min(values), max(values))
        assert held.sum == sum(values) and held.sum_squares == sum(v * v for v in values)
        edges = zip([-np.inf, *held.bucket_limit], held.bucket_limit, held.bucket, strict=False)
        assert all(sum(low <= v < high for v in values) == count for low, high, count in edges)
    shown = events.Tensors("samples/text_summary")
    assert [e.step for e in shown] == list(range(6))
    text = shown[-1].tensor_proto.string_val[0].decode()
    assert text.count(f"\n    RESPONSE\n    {SHOWN}\n") == 1 and text.endswith(f"\n    {SHOWN}")
    assert text.startswith(
        "    step 5  split train  chosen best  prompt_id 2  sample_id 1  reward 1"
    )


def test_tensorboard_drops_the_steps_that_are_taken_again(tmp_path):
    """TensorBoard's server drops their texts too, which this reader of its files does not."""
    run(tmp_path, BOARD, 0, 4)
    run(tmp_path, BOARD, 2, 5, offset=100)
    events = EventAccumulator(str(tmp_path / "tensorboard"), ALL).Reload()
    expected = [(0, 0.0), (1, 0.25), (2, 0.5), (3, 100.75), (4, 101.0), (5, 101.25)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == expected
    assert [e.step for e in events.Histograms("response_length")] == list(range(6))


def wandb_records(path: Path) -> list:
    """The records of a .wandb file: after a header of 7 bytes, blocks of 32 KiB hold pieces, each
    with a checksum, a length and a type (1: a whole record, 2 to 4: its first, middle, last)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def finished(path: Path) -> list:
    """Its records when W&B's own process has written the last one, which `finish` may not wait
    for."""
    deadline = time.monotonic() + 30
    while not (records := wandb_records(path)) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return records


def wandb_history(run_dir: Path) -> list[dict]:
    """The rows of all W&B runs in a directory, in their order, and what the files hold."""
    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for record in finished(path):
            if record.HasField("history"):
                row: dict = {}
                for item in record.history.item:
                    *outer, last = item.nested_key or [item.key]
                    inner = row
                    for key in outer:
                        inner = inner.setdefault(key, {})
                    inner[last] = json.loads(item.value_json)
                rows.append(
                    row | {"_step": record.history.step.num, "_files": path.parent / "files"}
                )
    return rows


def test_wandb_has_scalars_histograms_and_tables_of_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, WANDB, 0, 3)
    run(tmp_path, WANDB, 2, 5, offset=100)  # it had been killed after step 3
    name, last = (tmp_path / "wandb-id.txt").read_text().split()
    assert len(name) == 8 and last == "5"
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{name}.wandb"] * 2
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    rows = wandb_history(tmp_path)
    values = [(row["_step"], row["loss"]) for row in rows]
    assert values == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 101.0), (5, 101.25)]
    for row in rows:
        held = row["response_length"]
        counts, edges = np.histogram(LENGTHS, bins=64)
        assert held["_type"] == "histogram" and held["values"] == counts.tolist()
        assert np.allclose(held["bins"], edges)
        assert sum(row["reward"]["values"]) == 4
        table = json.loads((row["_files"] / row["samples"]["path"]).read_text())
        assert table["columns"] == list(COLUMNS) and len(table["data"]) == 2
        cells = dict(zip(COLUMNS, table["data"][0], strict=True))
        assert (cells["step"], cells["sample_id"], cells["reward"]) == (row["_step"], 1, 1.0)
        assert cells["response"] == SHOWN and cells["set"] is None


@pytest.fixture
def local(tmp_path, monkeypatch) -> Path:
    """trackio as a new process has it, with a directory of its own and no way out; a user of the
    Hub is logged in."""
    pytest.importorskip("trackio")
    place = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(place))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)

    def refused(*_) -> None:
        raise AssertionError("it connects")

    connected = []
    monkeypatch.setattr(socket.socket, "connect", lambda *words: connected.append(words))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: connected.append(words))
    forget_trackio(monkeypatch)
    yield place
    assert connected == []


def forget_trackio(monkeypatch) -> None:
    """It reads its variables as it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)


def trackio_rows(place: Path, project: str = "a-project") -> list[dict]:
    with sqlite3.connect(place / f"{project}.db") as database:
        found = database.execute("SELECT run_name, run_id, step, metrics FROM metrics ORDER BY id")
        names = ("run_name", "run_id", "step", "metrics")
        rows = [dict(zip(names, row, strict=True)) for row in found]
    return [row | {"metrics": json.loads(row["metrics"])} for row in rows]


def test_trackio_has_all_of_it_on_this_machine_of_each_step_once(tmp_path, local, capfd):
    run(tmp_path / "run", TRACKIO, 0, 3)
    run(tmp_path / "run", TRACKIO, 2, 5, offset=100)
    run(tmp_path / "more" / "run", TRACKIO, 0, 0)  # another one of the same name
    name, last = (tmp_path / "run" / "trackio-id.txt").read_text().split()
    assert name.startswith("run-") and last == "5"
    rows = trackio_rows(local)
    other = rows.pop()
    assert other["run_name"].startswith("run-") and other["run_name"] != name
    assert {row["run_name"] for row in rows} == {name} and len({row["run_id"] for row in rows}) == 1
    values = [(row["step"], row["metrics"]["loss"]) for row in rows]
    assert values == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 101.0), (5, 101.25)]
    for row in rows:
        held = row["metrics"]["response_length"]
        counts, edges = np.histogram(LENGTHS, bins=64)
        assert held["_type"] == "trackio.histogram" and held["values"] == counts.tolist()
        assert np.allclose(held["bins"], edges)
        best, worst = row["metrics"]["samples"]["_value"]
        assert list(best) == list(COLUMNS) and best["response"] == SHOWN
        assert (best["reward"], worst["reward"], best["step"]) == (1.0, 0.0, row["step"])
    with sqlite3.connect(local / "a-project.db") as database:
        configs = [json.loads(text) for (text,) in database.execute("SELECT config FROM configs")]
        held = database.execute("SELECT COUNT(*) FROM system_metrics").fetchone()
    assert [(c["seed"], c["task_args"], c["_Username"]) for c in configs] == [
        (3, {"api_key": "(not shown)"}, None)
    ] * 2
    assert held == (0,)
    assert TOKEN not in "".join(capfd.readouterr())
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)
    assert not any(SECRET.encode() in path.read_bytes() for path in kept)


def test_a_name_that_trackio_reserves_is_refused(tmp_path, local):
    conf = LogConf(tensorboard=False, trackio="registry-mine")
    with pytest.raises(
        Refusal, match="^log.trackio=registry-mine: trackio: Project name .*; do as"
    ):
        Trackers(tmp_path, conf, 5, {}, 0)


@pytest.mark.filterwarnings("ignore:trackio failed to flush")
def test_trackio_that_cannot_write_is_a_warning(tmp_path, local, capfd):
    local.write_text("a file where its directory would be")
    trackers = Trackers(tmp_path, TRACKIO, 5, {}, 0)
    for step in range(3):
        trackers.log(step, entry(step))
    trackers.close(60)
    expected = "trackio failed 1 time (RuntimeError: write-logs-to-sqlite: see its own warning)"
    assert trackers.summaries() == [expected]
    assert capfd.readouterr().err.count("trackio failed (RuntimeError: write-logs-to-sqlite") == 1


def test_trackio_asks_for_what_a_server_needs(tmp_path, local, monkeypatch):
    monkeypatch.setenv("TRACKIO_SERVER_URL", "https://a.b")
    monkeypatch.delenv("TRACKIO_WRITE_TOKEN", raising=False)
    with pytest.raises(Refusal, match="log.trackio=a-project: trackio: .* requires a write token"):
        Trackers(tmp_path, TRACKIO, 5, {}, 0)
