"""Whole runs that share a directory, or that were changed between a start and a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from foreground import Foreground, steps_of
from launching import launch

WORDS = [
    "conf=qwen3_tiny", "num_prompts=4", "group_size=2", "eval.every=0", "eval.num_prompts=4",
    "eval.num_samples=1", "log.tensorboard=false", "checkpoint.every=1",
]  # fmt: skip
TASK = """
from dataclasses import dataclass
from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt

@dataclass(frozen=True)
class Own(SpellBackward):
    def score(self, prompt, response):
        return {score}

@dataclass(frozen=True)
class Hashed(SpellBackward):
    "Ordered by hashes, as a set is: they differ from Python to Python."
    def train_prompts(self, step, num):
        return sorted(super().train_prompts(step, num), key=lambda p: hash(p.text))
"""


def test_a_run_that_is_alive_is_not_resumed_and_loses_nothing(tmp_path):
    path = tmp_path / "run"
    job = Foreground("grpo.py", 1, *WORDS, "steps=1000", f"run_dir={path}")
    job.wait_for(lambda: (path / "checkpoints" / "step-2").exists())
    refused = launch("recipes/grpo.py", 1, f"resume={path}", "steps=2000", status=2)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert f"resume={path}: another run writes to this directory (host" in refused.stderr
    assert f", pid {job.popen.pid}, since" in refused.stderr
    assert not (path / "environment-2.json").exists()
    out, _ = job.press_ctrl_c()
    last = steps_of(path)[-1]
    assert steps_of(path) == list(range(last + 1))
    assert f"to continue after step {last}: resume={path}" in out
    kept = {item.name for item in (path / "checkpoints").glob("step-*")}
    assert kept == {f"step-{last - 1}", f"step-{last}"}
    launch("recipes/grpo.py", 2, f"resume={path}", f"steps={last + 1}")
    assert steps_of(path) == list(range(last + 2))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A directory with a run of two steps of a task of its own, and the task's module."""
    root = tmp_path_factory.mktemp("begun")
    (root / "own_task.py").write_text(TASK.format(score="float(len(response))"))
    words = [*WORDS, "steps=2", "task=own_task:Own", f"run_dir={root / 'run'}"]
    launch("recipes/grpo.py", 1, *words, path=root)
    return root


def test_an_edited_config_is_refused_and_so_are_fewer_steps(begun, tmp_path):
    path = Path(shutil.copytree(begun / "run", tmp_path / "run"))
    config, before = path / "config.yaml", steps_of(path)
    written = config.read_text()
    config.write_text(written.replace("lr: 0.0006", "lr: 0.006").replace("size: 2", "size: 4"))
    refused = launch("recipes/grpo.py", 2, f"resume={path}", "steps=3", path=begun, status=2)
    title, *lines = refused.stderr.splitlines()[:3]
    assert title == "2 problems with the configuration:"
    assert lines[0].startswith("- group_size=4: the run computes with 2; put that back into")
    assert lines[1].startswith("- trainer.lr=0.006: the run computes with 0.0006; put that")
    config.write_text(written)
    refused = launch("recipes/grpo.py", 1, f"resume={path}", "steps=1", path=begun, status=2)
    assert refused.stderr == "steps=1: the run has taken 2 steps; use 2 or more\n"
    assert steps_of(path) == before


def test_another_score_is_a_warning_and_other_prompts_are_refused(begun, tmp_path):
    path = Path(shutil.copytree(begun / "run", tmp_path / "run"))
    module = tmp_path / "own_task.py"
    module.write_text(TASK.format(score="-float(len(response))"))
    words = [f"resume={path}", "steps=3"]
    resumed = launch("recipes/grpo.py", 2, *words, path=tmp_path)
    said = [line for line in resumed.stdout.splitlines() if "has changed since" in line]
    assert len(said) == 1 and said[0].startswith("warning: the task's module own_task has changed")
    draw = "    def train_prompts(self, step, num):\n"
    draw += "        return super().train_prompts(step + 1, num)"
    module.write_text(TASK.format(score=f"0.0\n{draw}"))
    words = [f"resume={path}", "steps=4"]
    refused = launch("recipes/grpo.py", 1, *words, path=tmp_path, status=2)
    assert "the task's prompts of step 3 are not those that the run drew" in refused.stderr
    assert steps_of(path) == [0, 1, 2, 3]


def test_prompts_in_the_order_of_hashes_are_refused_on_one_rank(begun, tmp_path):
    """The scoring process, a fresh Python with other hashes, draws them too."""
    words = [*WORDS, "task=own_task:Hashed", f"run_dir={tmp_path / 'run'}"]
    refused = launch("recipes/grpo.py", 1, *words, path=begun, status=2)
    assert "the prompts of step 1 are not the same in a fresh Python: prompt" in refused.stderr
    assert refused.returncode == 2 and not (tmp_path / "run").exists()
