"""Real runs that end too early and are resumed: L5 on the same mesh, and changes of the mesh.

The run that is resumed last is stopped by Ctrl-C, so that its checkpoint is seen too.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from foreground import Foreground, lines_of, steps_of
from launching import REPOSITORY, Run, launch, runs

from mesh.checkpoint.logs import LOGS
from mesh.runs.compare import compare_runs, untimed
from mesh.runs.lines import read_lines
from mesh.runs.samples import SAMPLES, member_of
from mesh.runs.timeline import TIMELINE

pytestmark = pytest.mark.timeout(900)  # of a slow machine; each launch has a limit of its own
WORDS = [
    "conf=qwen3_tiny", "num_prompts=8", "group_size=4", "eval.every=0", "eval.num_prompts=8",
    "eval.num_samples=1", "log.tensorboard=false", "log.samples=-1", "trainer.warmup_steps=20",
    "kl_coef=0.01", "batch_invariant=true",
]  # fmt: skip


def trained(metrics: list[dict]) -> list[dict]:
    """What a step's line says of the training alone."""
    lines = map(untimed, metrics)
    return [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines]


def newest(checkpoints: Path) -> int:
    names = (item.name.removeprefix("step-") for item in checkpoints.glob("step-*"))
    return max(int(name) for name in names if name.isdigit())


def killed(path: Path, *words: str) -> int:
    """Start a run with further words, kill -9 a rank of it at a random moment after the first
    checkpoint; the number of steps that it had taken."""
    words = (*WORDS, *words, "steps=1000", "checkpoint.every=2", f"run_dir={path}")
    job = Foreground("grpo.py", 2, *words)
    job.wait_for(lambda: (path / "checkpoints" / "step-2").exists())
    delay, victim = random.uniform(0, 1.5), random.randrange(2)
    print(f"rank {victim} is killed {delay:.3f} s after the first checkpoint")
    time.sleep(delay)
    os.kill(job.ranks()[victim], signal.SIGKILL)
    _, err = job.popen.communicate(timeout=60)
    assert job.popen.returncode != 0, err
    assert f"resume={path} continues after step {newest(path / 'checkpoints')}\n" in err
    return steps_of(path)[-1]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Run, Run]:
    """A run on two ranks that was killed, and resumed to take two steps more than it had; and the
    same run, never killed, which writes no checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "killed"
    steps = f"steps={killed(path) + 2}"
    made = runs(
        root,
        2,
        {"again": ("grpo", [f"resume={path}", steps]), "uninterrupted": ("grpo", [*WORDS, steps])},
    )
    return Run(path, made["again"].output), made["uninterrupted"]


@pytest.fixture(scope="module")
def resumed(both) -> Run:
    made = both[0]
    steps = made.metrics[-1]["step"]
    assert [line["step"] for line in made.metrics] == list(range(steps + 1))
    return made


@pytest.fixture(scope="module")
def uninterrupted(both) -> Run:
    return both[1]


def test_killed_and_resumed_is_the_run_that_was_never_killed(resumed, uninterrupted):
    """Every line of both logs: tokens, rewards, losses, gradients, weights."""
    steps = resumed.metrics[-1]["step"]
    compared = compare_runs(resumed.path, uninterrupted.path)
    assert compared.first is None
    assert (compared.steps, compared.samples) == (steps + 1, len(resumed.kept))
    assert len(resumed.samples) == steps * 8 * 4 < len(resumed.kept)
    assert len({line["digest/weights"] for line in uninterrupted.metrics[1:]}) == steps
    for run in (resumed, uninterrupted):
        timeline = read_lines(run.path / "timeline.jsonl")
        assert [line["step"] for line in timeline] == list(range(steps + 1))
    assert all(line["logprob_diff/max"] == 0 < line["kl"] for line in uninterrupted.metrics[2:])
    assert (resumed.path / "model" / "model.safetensors").is_file()
    assert "resumed from" in resumed.output
    assert (resumed.path / "environment-2.json").is_file()
    assert not (uninterrupted.path / "checkpoints").exists()


def test_torchrun_restarts_it_by_itself(uninterrupted, tmp_path):
    """Killed before there is a checkpoint it starts over, killed later it resumes, and torchrun's
    status is 0 in the end. The run directory's name is made of the time of the first start."""
    words = [*WORDS, "steps=12", "checkpoint.every=2"]
    job = Foreground("grpo.py", 2, *words, more=["--max-restarts=2"], cwd=tmp_path)
    runs = tmp_path / "runs"
    job.wait_for(lambda: any(runs.glob("*/environment.json")))
    first = job.ranks()
    os.kill(first[0], signal.SIGKILL)
    job.wait_for(lambda: any(runs.glob("*/checkpoints/step-2")))
    assert len(job.ranks()) == 2 and not set(job.ranks()) & set(first)
    os.kill(job.ranks()[1], signal.SIGKILL)
    out, err = job.popen.communicate(timeout=120)
    assert job.popen.returncode == 0, err
    (path,) = runs.iterdir()
    assert f"attempt 2 starts over: it had no checkpoint yet, run_dir=runs/{path.name}" in out
    assert f"attempt 3 continues, run_dir=runs/{path.name}" in out
    made = Run(path, out)
    assert [line["step"] for line in made.metrics] == list(range(13))
    both = min(12, uninterrupted.metrics[-1]["step"])
    assert trained(made.metrics[: both + 1]) == trained(uninterrupted.metrics[: both + 1])
    assert [s for s in made.samples if s["step"] <= both] == [
        s for s in uninterrupted.samples if s["step"] <= both
    ]


@pytest.fixture(scope="module")
def replayed(resumed, tmp_path_factory) -> dict[str, list[str]]:
    """What recipes/replay.py prints of the last step of the run, and of a copy in which a metric
    and a sample are changed and the newest earlier checkpoint is damaged. It may change no file."""
    root, steps = tmp_path_factory.mktemp("replays"), resumed.metrics[-1]["step"]
    paths = {"same": resumed.path, "changed": root / "copy"}
    change(Path(shutil.copytree(resumed.path, paths["changed"])), steps)
    before = [contents(path) for path in paths.values()]
    words = [f"step={steps}", "log.samples=3"]
    asked = {name: ("replay", [str(path), *words]) for name, path in paths.items()}
    made = runs(root, 2, asked, statuses={"changed": 1})
    assert [contents(path) for path in paths.values()] == before
    return {name: run.output.splitlines() for name, run in made.items()}


def change(path: Path, steps: int) -> None:
    lines, samples = read_lines(path / "metrics.jsonl"), Run(path, "").kept
    lines[-1]["grad_norm"] += 1e-9
    samples[-2]["reward"] += 1e-9
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / SAMPLES).write_bytes(member_of(samples))
    (checkpoint_before(path, steps) / "rank-1.safetensors").write_bytes(b"")


def contents(path: Path) -> dict[Path, bytes | None]:
    return {item: item.read_bytes() if item.is_file() else None for item in path.rglob("*")}


def checkpoint_before(path: Path, step: int) -> Path:
    """The newest checkpoint of fewer steps."""
    held = {int(item.name[5:]): item for item in (path / "checkpoints").glob("step-*")}
    return held[max(number for number in held if number < step)]


def test_a_step_that_is_run_again_is_the_one_that_was_logged(resumed, replayed):
    """The last step, from the checkpoint before it; it was evaluated too."""
    lines, steps = replayed["same"], resumed.metrics[-1]["step"]
    before = checkpoint_before(resumed.path, steps).name
    origin = f"step {steps} of {resumed.path}, run again from checkpoints/{before}"
    assert origin in lines
    logged = untimed(resumed.metrics[-1])
    kept = sum(sample["step"] == steps for sample in resumed.kept)
    assert kept == 32 + 8 * 2, "of training, and answers to the held-out prompts"
    assert lines[-1] == f"equal to the bit: {len(logged) - 1} metrics, {kept} samples"
    rows = {line.split()[0]: line.split() for line in lines if line.endswith(" equal")}
    assert rows["eval/accuracy"][1] == rows["eval/accuracy"][2] == str(logged["eval/accuracy"])
    assert rows["digest/weights"][2] == f'"{logged["digest/weights"]}"'
    assert len(rows.keys() & logged.keys()) == len(logged) - 1
    sample = next(s for s in resumed.samples if s["step"] == steps)
    assert any(f'"{sample["prompt"]}"' in line and str(sample["advantage"]) in line
               for line in lines)  # fmt: skip
    assert not any("bits may differ" in line for line in lines)


def test_a_replay_names_what_was_logged_otherwise(resumed, replayed):
    lines = replayed["changed"]
    damaged = rf"skipping .*/{checkpoint_before(resumed.path, resumed.metrics[-1]['step']).name}: "
    assert any(re.match(damaged + "rank-1.safetensors has 0 bytes", line) for line in lines)
    assert lines[-1] == "DIFFERENT: grad_norm; 1 of 48 samples"
    (row,) = [line for line in lines if line.startswith("grad_norm")]
    assert row.split()[1] != row.split()[2] == str(resumed.metrics[-1]["grad_norm"])
    assert len([line for line in lines if line.endswith("differs: reward")]) == 1


def test_continues_on_four_ranks_with_tensor_parallelism_then_split_until_ctrl_c(resumed):
    """Loading compares the digests of weights and moments with those of the mesh that saved."""
    path, steps = resumed.path, resumed.metrics[-1]["step"]
    before = lines_of(path / "metrics.jsonl")
    said = f"resumed from {path}/checkpoints/step-%d: the digests of weights and moments match"
    words = ["trainer.tp=2", "generator.tp=2", f"steps={steps + 1}"]
    assert said % steps in launch("recipes/grpo.py", 4, f"resume={path}", *words).stdout
    job = Foreground("grpo.py", 2, f"resume={path}", "mesh.mode=split")  # one rank trains
    job.wait_for(lambda: steps_of(path)[-1] >= steps + 3)
    out, _ = job.press_ctrl_c()
    assert said % (steps + 1) in out
    logged, last = lines_of(path / "metrics.jsonl"), steps_of(path)[-1]
    assert steps_of(path) == list(range(last + 1))
    assert logged[: steps + 1] == before
    index = json.loads((path / "checkpoints" / f"step-{last}" / "index.json").read_text())
    assert index["content"]["digests"]["weights"] == json.loads(logged[-1])["digest/weights"]
    assert index["content"]["files"].keys() == {"rank-0.safetensors", *LOGS, TIMELINE}
    assert f"to continue after step {last}: resume={path}" in out


def test_a_full_disk_ends_the_run_which_resumes_where_there_is_room(tmp_path):
    """A tmpfs that holds two checkpoints and not a third, in a namespace of its own."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=12m tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a tmpfs")
    words = [*WORDS, "steps=9", "checkpoint.every=1", f"run_dir={disk}/run"]
    command = shlex.join([sys.executable, str(REPOSITORY / "recipes" / "grpo.py"), *words])
    script = f"{mount}; {command}; status=$?; cp -r {disk}/run {kept}; exit $status"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=environment
    )
    assert ended.returncode != 0
    *_, last, reason, offer = ended.stderr.rstrip().splitlines()
    assert "RuntimeError" in last and "No space left on device" in last  # checkpoint, or log
    assert f"{disk}/run" in last
    assert re.search(r"step \d is not saved: .*No space left on device", reason)
    assert f"resume={disk}/run continues after step 2" in offer
    assert {p.name for p in (kept / "checkpoints").glob("step-*")} == {"step-1", "step-2"}
    out = launch("recipes/grpo.py", 1, f"resume={kept}", "steps=3").stdout
    assert f"resumed from {kept}/checkpoints/step-2" in out
    assert steps_of(kept) == [0, 1, 2, 3]
    assert {p.name for p in (kept / "checkpoints").glob("step-*")} == {"step-2", "step-3"}
