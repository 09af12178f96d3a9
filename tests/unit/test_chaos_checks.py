"""The schedule of tools/chaos.py, and faults that its checks must find in a finished run."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mesh.runs.samples import SAMPLES as FILE
from mesh.runs.samples import member_of, members
from tools.chaos.checks import finished_problems, kept_problems, kept_text, newest, text_problems
from tools.chaos.plan import FIRST, MESHES, plan


@pytest.mark.parametrize("seed", range(5))
def test_fifty_rounds_meet_every_phase_five_times_and_change_the_mesh(seed):
    rounds = plan(50, seed, 4)
    assert rounds == plan(50, seed, 4) != plan(50, seed + 1, 4)
    kills = Counter(point.phase for planned in rounds for point in planned.kill_points)
    assert kills.keys() == {*FIRST, "load"} and min(kills.values()) >= 5
    changing = [planned for planned in rounds if len(set(planned.meshes)) > 1]
    assert len(changing) >= 15
    for planned in rounds:
        phases = [point.phase for point in planned.kill_points]
        assert len(planned.meshes) == len(phases) + 1
        assert phases[0] != "load" and (len(phases) == 1 or phases[0] not in ("startup",))
    small = plan(20, seed, 2)
    assert {MESHES[mesh][0] for planned in small for mesh in planned.meshes} == {2}


STEPS, SAMPLES = 3, 2
BEST = [0.5, 0.25, 0.5, 0.75]  # the evaluations after each step


def finished(path: Path) -> Path:
    """What a run of three steps leaves, as far as it is looked at."""
    checkpoint = path / "checkpoints" / f"step-{STEPS}"
    (path / "checkpoints" / "step-2").mkdir(parents=True)
    (path / "model").mkdir()
    checkpoint.mkdir()
    for step, best in ((2, 0), (3, 3)):
        named = {"step": best, "value": BEST[best], "metric": "eval/accuracy"}
        content = {"digests": {"weights": "3"}, "best": named}
        index = path / "checkpoints" / f"step-{step}" / "index.json"
        index.write_text(json.dumps({"content": content}))
        (path / "best" / f"step-{best}").mkdir(parents=True)
        save_file({}, path / "best" / f"step-{best}" / "model.safetensors")
    metrics = [
        {"step": step, "digest/weights": str(step), "eval/accuracy": BEST[step]}
        for step in range(STEPS + 1)
    ]
    samples = [
        {"step": step, "split": "train", "prompt_id": 10 * step, "sample_id": sample}
        for step in range(1, STEPS + 1)
        for sample in range(SAMPLES)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (path / FILE).write_bytes(b"".join(member_of([row]) for row in samples))
    return path


def samples(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def edited(path: Path) -> None:
        rows = [gzip.compress(part) for part in members(path / FILE)]
        (path / FILE).write_bytes(b"".join(change(rows)))

    return edited


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def edited(path: Path) -> None:
        lines = (path / name).read_text().splitlines(keepends=True)
        (path / name).write_text("".join(change(lines)))

    return edited


WRONG = {
    "metrics.jsonl holds steps [0, 1, 3]": edit("metrics.jsonl", lambda x: [*x[:2], x[3]]),
    "metrics.jsonl holds steps [0, 1, 2, 2, 3]": edit(
        "metrics.jsonl", lambda x: [*x[:3], x[2], x[3]]
    ),
    f"{FILE} holds 5 rollouts": samples(lambda x: x[1:]),
    f"{FILE} holds 7 rollouts": samples(lambda x: [x[0], *x]),
    f"{FILE}.partial was left": lambda p: (p / f"{FILE}.partial").touch(),
    "step-3.partial was left": lambda p: (p / "checkpoints" / "step-3.partial").mkdir(),
    "step-1.damaged was left": lambda p: (p / "checkpoints" / "step-1.damaged").mkdir(),
    "checkpoints of steps [2] are kept": lambda p: (p / "checkpoints" / "step-3").rename(p / "x"),
    "checkpoints of steps [3, 2, 1] are kept": lambda p: (p / "checkpoints" / "step-1").mkdir(),
    "metrics.jsonl.partial was left": lambda p: (p / "metrics.jsonl.partial").touch(),
    "best/step-2.partial was left": lambda p: (p / "best" / "step-2.partial").mkdir(),
    "best models of steps [0] are kept": lambda p: (p / "best" / "step-3").rename(p / "x"),
    "best models of steps [3, 2, 0] are kept": lambda p: shutil.copytree(
        p / "best" / "step-0", p / "best" / "step-2"
    ),
    "the best model of step 3 is not whole: model.safetensors has": lambda p: (
        p / "best" / "step-3" / "model.safetensors"
    ).write_bytes((p / "best" / "step-3" / "model.safetensors").read_bytes() + b"x"),
    "the last checkpoint names {'step': 3, 'value': 0.75, 'metric'": edit(
        "metrics.jsonl", lambda x: [x[0], x[1].replace("0.25", "0.75"), *x[2:]]
    ),
    "the final model is not whole": lambda p: (p / "model.partial").mkdir(),
    "the last checkpoint holds other weights than were logged": edit(
        "metrics.jsonl", lambda x: [line.replace('"3"', '"4"') for line in x]
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_with_a_finished_run_is_seen(said, tmp_path):
    path = finished(tmp_path / "run")
    assert finished_problems(path, STEPS, SAMPLES) == []
    WRONG[said](path)
    (problem,) = finished_problems(path, STEPS, SAMPLES)
    assert problem.startswith(said)


def test_lines_before_the_checkpoint_must_stay(tmp_path):
    reference, path = finished(tmp_path / "reference"), finished(tmp_path / "run")
    assert newest(path) == 3 and newest(tmp_path) is None
    with (path / FILE).open("ab") as file:
        file.write(member_of([{"step": 2, "prompt_id": 5}])[:-3])  # torn
    kept = kept_text(path, 2)
    assert [text.count(b"\n") for text in kept.values()] == [3, 4]
    assert kept_problems(kept, reference, 2) == [] == text_problems(path, [kept])
    edit("metrics.jsonl", lambda x: [x[0], x[1].replace('"1"', '"8"'), *x[2:]])(path)
    assert text_problems(path, [kept]) == [
        "metrics.jsonl: lines before the checkpoint have changed"
    ]
    (problem,) = kept_problems(kept_text(path, 2), reference, 2)
    assert problem.endswith('metrics.jsonl step 1: digest/weights differs: "8" and "1"')
