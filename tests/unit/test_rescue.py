"""What a failed run saves, on one rank: the state between two steps, bit for bit, or nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import advance, advance_badly, bits_of, conf_of, loaded, names_in, trainer_of

from mesh.checkpoint.files import read_index
from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.rescue import Plan, plan_of
from mesh.checkpoint.same_run import Inputs
from mesh.lifecycle.meeting import Meeting
from mesh.lifecycle.process import Process
from mesh.rl.samples import StepRecord
from mesh.roles.trainer import Trainer

INF = float("inf")


def begun(process: Process, path: Path, steps: int, *words: str) -> tuple[Checkpointer, Trainer]:
    """A run that writes no checkpoints, after so many steps."""
    conf = conf_of("checkpoint.every=0", "on_nonfinite=stop", *words)
    path.mkdir()
    trainer = trainer_of(conf)
    keeper = Checkpointer(conf, path, process, trainer, Inputs())
    for step in range(1, steps + 1):
        advance(trainer, step)
        for name in ("metrics.jsonl", "samples.jsonl.gz"):
            with open(path / name, "a") as file:
                file.write(f"{step}\n")
        keeper.after(step, stop=False)
    return keeper, trainer


def rescued(keeper: Checkpointer) -> str:
    return keeper.rescue(Meeting(0, 1, dist.HashStore(), lambda _: False, lambda _: False))


def test_the_last_completed_step_is_saved_with_the_logs_of_then(process, tmp_path):
    path = tmp_path / "run"
    keeper, trainer = begun(process, path, 3)
    with open(path / "metrics.jsonl", "a") as file:
        file.write("a line of step 4\n")
    assert rescued(keeper) == f"resume={path} continues after step 3"
    assert names_in(path) == ["step-3"]
    assert (path / "checkpoints" / "logs" / "metrics.jsonl").read_text() == "1\n2\n3\n"
    step, other = loaded(process, path, keeper.conf)
    assert (step, other.steps, other.updates) == (3, 3, 3)
    mine, theirs = bits_of(trainer), bits_of(other)
    assert len(mine) > 60 and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert trainer.optimizer.hold(0.0) is None  # no update can begin any more


def test_a_step_that_is_not_finite_leaves_the_one_before(process, tmp_path):
    """It fails inside `Trainer.update`, but before the weights are touched."""
    keeper, trainer = begun(process, tmp_path / "run", 2)
    with pytest.raises(RuntimeError, match="on_nonfinite=stop"):
        advance_badly(trainer)
    assert rescued(keeper) == f"resume={tmp_path / 'run'} continues after step 2"


def test_a_failure_within_an_update_saves_nothing(process, tmp_path, monkeypatch):
    keeper, trainer = begun(process, tmp_path / "run", 2)

    def fail(*_) -> None:
        raise torch.cuda.OutOfMemoryError("half of the weights have moved")

    monkeypatch.setattr(trainer.optimizer.inner, "step", fail)
    with pytest.raises(RuntimeError, match="half of the weights"):
        advance(trainer, 3)
    assert rescued(keeper) == (
        "step 2 is not saved: rank 0 failed, or hangs, inside an update\n"
        "there is no checkpoint to resume from"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_failure_between_an_update_and_its_end_saves_nothing(process, tmp_path):
    keeper, trainer = begun(process, tmp_path / "run", 2)
    advance(trainer, 3)
    assert rescued(keeper).startswith("step 2 is not saved: rank 0 failed between an update and")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_trained_step_is_logged_by_the_resumed_run_alone(process, tmp_path):
    """Its metrics come back with their bits; its checkpoint is replaced by the logged one."""
    path = tmp_path / "run"
    keeper, trainer = begun(process, path, 2)
    advance(trainer, 3)
    metrics = {"loss": 0.1 + 0.2, "grad_norm": INF, "digest/weights": "ff"}
    samples = [{"prompt_id": p, "sample_id": s} for p in (1, 0) for s in (0, 1)]
    keeper.trained(3, StepRecord(metrics, samples, {"reward": [0.5, 1.0]}))
    assert rescued(keeper) == f"resume={path} continues after step 3"
    assert "unlogged-0.json" in read_index(path / "checkpoints" / "step-3").files

    conf = replace(conf_of("checkpoint.every=3"), resume=str(path))
    again = Checkpointer(conf, path, process, trainer_of(conf), Inputs())
    assert (again.load(), again.trainer.steps) == (2, 3)
    assert (path / "metrics.jsonl").read_text() == "1\n2\n"
    ordered = [{"prompt_id": p, "sample_id": s} for p in (0, 1) for s in (0, 1)]
    assert again.to_log() == StepRecord(metrics, ordered, {"reward": [0.5, 1.0]})
    assert again.to_log() is None
    again.after(3, stop=True)
    assert names_in(path) == ["step-3"]
    assert "unlogged-0.json" not in read_index(path / "checkpoints" / "step-3").files
    files = json.loads((path / "checkpoints" / "step-3" / "index.json").read_text())
    assert "unlogged-0.json" not in files["content"]["files"]


def test_rank_0_which_writes_the_logs_says_whether_the_step_is_logged():
    """Others may have passed the line at which it failed, or not reached it."""
    done = {"step": 3, "pending": None, "why": "", "saved": None, "logged": True}
    not_yet = done | {"logged": False}
    assert plan_of([not_yet, done]) == Plan(write=3, log=True)
    assert plan_of([done, not_yet]) == Plan(write=3, log=False)


def test_what_was_to_be_logged_is_kept_until_the_next_step(process, tmp_path):
    path = tmp_path / "run"
    keeper, trainer = begun(process, path, 2)
    advance(trainer, 3)
    samples = [{"prompt_id": 0, "sample_id": 0}]
    keeper.trained(3, StepRecord({"loss": 0.5}, samples))
    keeper.after(3, stop=False)
    rest = keeper.rescue.rest
    assert rest is not None and rest.logged and rest.unlogged == StepRecord({"loss": 0.5}, samples)
    assert rescued(keeper) == f"resume={path} continues after step 3"
    assert "unlogged-0.json" not in read_index(path / "checkpoints" / "step-3").files


def test_a_disk_that_is_full_is_the_reason(process, tmp_path):
    path = tmp_path / "run"
    keeper, _ = begun(process, path, 2)
    (path / "checkpoints").write_text("in the way")
    assert "step 2 is not saved: " in rescued(keeper)
