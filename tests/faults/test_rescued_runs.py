"""Runs that fail: what they save, what they say that resuming gives, and that resuming gives it."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from foreground import Foreground, steps_of
from launching import Run, launch

from mesh.checkpoint.rescue import Plan, plan_of
from mesh.lifecycle.meeting import Interrupted, Meeting
from mesh.runs.compare import compare_runs

pytestmark = pytest.mark.timeout(900)  # of a slow machine; each launch has a limit of its own
WORDS = [
    "conf=qwen3_tiny", "num_prompts=4", "group_size=4", "steps=5", "eval.every=1",
    "eval.num_prompts=8", "eval.num_samples=1", "log.samples=-1", "log.tensorboard=false",
    "task=user_tasks:Troubled", "reward.workers=0", "batch_invariant=true",
]  # fmt: skip


def steps_saved(path: Path) -> list[str]:
    folder = path / "checkpoints"
    return sorted(item.name for item in folder.glob("step-*")) if folder.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[int, Path]:
    """The same run, untroubled, by the number of its ranks."""
    root = tmp_path_factory.mktemp("uninterrupted")
    for ranks in (1, 2):
        launch("recipes/grpo.py", ranks, *WORDS, f"run_dir={root / str(ranks)}")
    return {ranks: root / str(ranks) for ranks in (1, 2)}


@pytest.mark.parametrize(
    ("ranks", "every", "held_out", "saved", "step"),
    [
        (1, 0, False, ["step-2"], 2),
        (2, 0, False, ["step-2"], 2),  # rank 0 waits for rank 1 in a collective
        (1, 2, True, ["step-2", "step-3"], 3),  # trained, not evaluated; step 2 was being written
        (2, 0, True, ["step-3"], 3),
    ],
)
def test_a_score_that_raises_costs_no_finished_step(
    tmp_path, monkeypatch, uninterrupted, ranks, every, held_out, saved, step
):
    path = tmp_path / "run"
    monkeypatch.setenv("TROUBLE_STEP", "3")
    monkeypatch.setenv("TROUBLE_RANK", str(ranks - 1))
    if held_out:
        monkeypatch.setenv("TROUBLE_HELD_OUT", "1")
    words = [*WORDS, f"checkpoint.every={every}", f"run_dir={path}"]
    failed = launch("recipes/grpo.py", ranks, *words, status=1).stderr
    assert "the judge does not answer" in failed
    assert f"resume={path} continues after step {step}\n" in failed
    assert "is not saved" not in failed
    assert steps_saved(path) == saved
    monkeypatch.delenv("TROUBLE_STEP")
    resumed = launch("recipes/grpo.py", ranks, f"resume={path}").stdout
    assert f"resumed from {path}/checkpoints/step-{step}" in resumed
    compared = compare_runs(path, uninterrupted[ranks])
    assert compared.first is None
    run = Run(path, "")
    assert (compared.steps, compared.samples) == (6, len(run.kept))
    assert len(run.samples) == 5 * 4 * 4 < len(run.kept)


def test_a_stall_costs_no_finished_step(tmp_path, monkeypatch):
    for name, value in (("STEP", "3"), ("RANK", "1"), ("HANGS", "1")):
        monkeypatch.setenv(f"TROUBLE_{name}", value)
    path = tmp_path / "run"
    words = [*WORDS, "stall_seconds=10", f"run_dir={path}"]
    err = launch("recipes/grpo.py", 2, *words, status=1).stderr
    assert "the run stalled" in err
    assert f"resume={path} continues after step 2\n" in err
    assert steps_saved(path) == ["step-2"]


def test_nothing_is_offered_where_nothing_was_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("TROUBLE_STEP", "1")
    path = tmp_path / "run"
    failed = launch("recipes/grpo.py", 1, *WORDS, f"run_dir={path}", status=1).stderr
    assert "the judge does not answer" in failed
    assert "resume=" not in failed.split("on_failure=zero")[1]
    assert steps_saved(path) == []


def test_a_killed_rank_without_checkpoints_offers_nothing(tmp_path):
    path = tmp_path / "run"
    words = [word for word in WORDS if not word.startswith(("task", "steps"))]
    job = Foreground("grpo.py", 2, *words, "steps=1000", f"run_dir={path}")
    job.wait_for(lambda: (path / "metrics.jsonl").exists() and len(steps_of(path)) > 3)
    os.kill(job.ranks()[1], signal.SIGKILL)
    err = job.popen.communicate(timeout=120)[1]
    assert job.popen.returncode != 0
    said = re.search(r"^step (\d+) is not saved: (.*)\n(.*)\n", err, re.M)
    assert said and int(said[1]) in steps_of(path)[-2:]
    assert said.group(2, 3) == (
        "rank 1 cannot take part",
        "there is no checkpoint to resume from",
    )
    assert "continues after" not in err and steps_saved(path) == []


def said(
    step: int = 4,
    pending: int | None = None,
    why: str = "",
    saved: int | None = None,
    logged: bool = True,
):
    return {"step": step, "pending": pending, "why": why, "saved": saved, "logged": logged}


@pytest.mark.parametrize(
    ("answers", "plan"),
    [
        ([said(), said()], Plan(write=4)),
        ([said(), None], Plan(why="rank 1 cannot take part")),
        ([said(), said(why="rank 1 hangs")], Plan(why="rank 1 hangs")),
        ([said(), said(5)], Plan(why="the ranks have completed different steps, [4, 5]")),
        ([said(pending=2), said(pending=2)], Plan(finish=2, write=4)),
        ([said(pending=4), said(pending=4)], Plan(finish=4)),
        ([said(pending=2), said()], Plan(write=4)),
        ([said(saved=4), said(saved=3)], Plan()),  # rank 0 writes, so it knows
        ([said(pending=2), said(why="x", pending=2)], Plan(finish=2, why="x")),
        ([said(logged=False), said(logged=False)], Plan(write=4, log=True)),
        ([said(), said(logged=False)], Plan(write=4)),  # rank 0 has logged it
        ([said(logged=False), said()], Plan(write=4, log=True)),  # which keeps its samples
    ],
)
def test_the_plan_that_follows_from_the_answers(answers, plan):
    assert plan_of(answers) == plan


def meetings(gone: set[int], signalled: bool = False) -> list[Meeting]:
    store = dist.HashStore()
    wait = threading.Event().wait

    def heard(seconds: float) -> bool:
        wait(seconds)
        return signalled

    return [Meeting(rank, 3, store, gone.__contains__, heard) for rank in range(3)]


def test_a_meeting_waits_for_no_rank_that_is_gone_and_decides_once():
    first, second, _ = meetings(gone={2})
    second.tell("question", {"a": 1})
    assert first.answers("question", "mine", seconds=100) == ["mine", {"a": 1}, None]
    assert first.decide("what", [1]) == [1]
    assert second.decide("what", [2]) == [1]


def test_a_meeting_ends_at_its_time_and_at_a_signal():
    assert meetings(gone=set())[0].answers("question", 0, seconds=0.2) == [0, None, None]
    with pytest.raises(Interrupted):
        meetings(gone=set(), signalled=True)[0].answers("question", 0, seconds=100)
