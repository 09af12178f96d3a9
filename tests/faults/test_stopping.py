"""Ctrl-C on the real recipes: what a stopped run leaves, and that nothing survives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launching import REPOSITORY, TORCHRUN
from safetensors.torch import load_file

from mesh.config.schema import PACKAGE_DATA
from mesh.lifecycle.ending import alive

SHIPPED = PACKAGE_DATA / "qwen3_tiny" / "model.safetensors"
SMALL = ["conf=qwen3_tiny", "eval.num_prompts=8", "eval.num_samples=1", "log.tensorboard=false"]
STEPS = 1000  # more than there is time for


class Foreground:
    """A recipe as a terminal's foreground job: a process group of its own. more: torchrun's."""

    def __init__(
        self, recipe: str, num_ranks: int, *words: str, more: Sequence[str] = (), **options
    ):
        launcher = [*TORCHRUN, f"--nproc-per-node={num_ranks}", *more] if num_ranks > 1 else []
        self.num_ranks = num_ranks
        self.popen = subprocess.Popen(
            [*(launcher or [sys.executable]), str(REPOSITORY / "recipes" / recipe), *words],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def ranks(self) -> list[int]:
        """Process ids of the ranks: torchrun's children, or the one process."""
        if self.num_ranks == 1:
            return [self.popen.pid]
        tasks = Path(f"/proc/{self.popen.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                os.killpg(self.popen.pid, signal.SIGKILL)
                raise AssertionError("\n".join(self.popen.communicate()))
            time.sleep(0.05)

    def listens(self) -> bool:
        """Whether every rank has its signal handlers: Python alone leaves SIGTERM to the system."""
        ranks = self.ranks()
        return len(ranks) == self.num_ranks and all(map(catches_sigterm, ranks))

    def press_ctrl_c(self) -> tuple[str, str]:
        """stdout and stderr of a job that ends within 30 s with all its ranks."""
        ranks, began = self.ranks(), time.monotonic()
        assert len(ranks) == self.num_ranks
        os.killpg(self.popen.pid, signal.SIGINT)
        out, err = self.popen.communicate(timeout=60)
        while any(map(alive, ranks)) and time.monotonic() < began + 30:
            time.sleep(0.05)  # a rank closes its streams before it leaves
        assert not any(map(alive, ranks))
        assert time.monotonic() < began + 30
        return out, err


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def assert_stopped_and_saved(run_dir: Path, out: str, first_step: int) -> None:
    """`stopped n/m` with the run directory, metrics up to step n without gap, a whole model."""
    steps = [json.loads(line)["step"] for line in lines_of(run_dir / "metrics.jsonl")]
    assert steps == list(range(first_step, steps[-1] + 1))
    assert 1 <= steps[-1] < STEPS
    (line,) = [line for line in out.splitlines() if line.startswith("stopped")]
    assert f"stopped  {steps[-1]}/{STEPS} steps" in line
    assert line.endswith(f"run {run_dir}")
    saved, shipped = load_file(run_dir / "model" / "model.safetensors"), load_file(SHIPPED)
    assert {n: w.shape for n, w in saved.items()} == {n: w.shape for n, w in shipped.items()}
    assert any(not weight.equal(shipped[name]) for name, weight in saved.items())


def test_grpo_ends_after_the_step_with_its_model(tmp_path):
    run_dir = tmp_path / "run"
    words = [f"steps={STEPS}", "num_prompts=4", "group_size=2", f"run_dir={run_dir}"]
    job = Foreground("grpo.py", 2, *SMALL, *words)
    job.wait_for(lambda: len(lines_of(run_dir / "metrics.jsonl")) >= 3)
    out, err = job.press_ctrl_c()
    assert_stopped_and_saved(run_dir, out, first_step=0)
    last = len(lines_of(run_dir / "metrics.jsonl")) - 1
    assert f"to continue after step {last}: resume={run_dir}" in out
    assert [item.name for item in (run_dir / "checkpoints").iterdir()] == [f"step-{last}"]
    assert err.count("stopping at the end of this step; Ctrl-C again ends at once") == 1


def test_sigterm_leaves_a_checkpoint_and_status_0(tmp_path):
    run_dir = tmp_path / "run"
    words = [f"steps={STEPS}", "num_prompts=4", "group_size=2", f"run_dir={run_dir}"]
    job = Foreground("grpo.py", 1, *SMALL, *words)
    job.wait_for(lambda: len(lines_of(run_dir / "metrics.jsonl")) >= 3)
    job.popen.terminate()
    out, err = job.popen.communicate(timeout=60)
    assert job.popen.returncode == 0, err
    last = len(lines_of(run_dir / "metrics.jsonl")) - 1
    assert f"to continue after step {last}: resume={run_dir}" in out
    assert (run_dir / "checkpoints" / f"step-{last}" / "index.json").is_file()


def test_sft_ends_after_the_step_with_its_model(tmp_path):
    run_dir = tmp_path / "run"
    words = [f"sft.steps={STEPS}", "sft.batch_size=4", f"run_dir={run_dir}"]
    job = Foreground("sft.py", 1, *SMALL, *words)
    job.wait_for(lambda: len(lines_of(run_dir / "metrics.jsonl")) >= 3)
    out, _ = job.press_ctrl_c()
    assert_stopped_and_saved(run_dir, out, first_step=1)


@pytest.mark.parametrize(
    ("recipe", "num_ranks", "words"),
    [
        ("evaluate.py", 2, ["eval.num_prompts=512", "eval.num_samples=64"]),
        ("generate.py", 1, ["generate.prompts=-"]),
    ],
)
def test_what_saves_nothing_ends_at_once(recipe, num_ranks, words):
    reader, writer = os.pipe()  # a terminal at which nobody types
    job = Foreground(recipe, num_ranks, "conf=qwen3_tiny", *words, stdin=reader)
    job.wait_for(job.listens)
    out, err = job.press_ctrl_c()
    os.close(reader)
    os.close(writer)
    assert err.count("stopped: ended at once\n") == 1
    assert job.popen.returncode != 0
    assert out == ""
