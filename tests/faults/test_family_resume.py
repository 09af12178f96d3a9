"""L5 of the families: a run of each is killed and resumed, and is the run that was never killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from foreground import Foreground, steps_of
from launching import Run, runs
from tiny_families import RUNNING
from tiny_qwen3 import save_checkpoint

from mesh.runs.compare import compare_runs

pytestmark = pytest.mark.timeout(900)  # of a slow machine; each launch has a limit of its own
WORDS = [
    "conf=qwen3_tiny", "model.tokenizer=package:characters", "num_prompts=4", "group_size=4",
    "eval.every=0", "eval.num_prompts=4", "eval.num_samples=1", "log.tensorboard=false",
    "log.samples=-1", "trainer.dp_shard=1", "trainer.tp=2", "trainer.lr=1e-3", "kl_coef=0.01",
    "batch_invariant=true", "check=strict",
    # random weights answer nothing rightly: rewards that differ, so that steps have a gradient
    "task=mesh.exactness.uneven:Uneven", "task_args.name=spell_backward", "reward.workers=0",
]  # fmt: skip


def killed(path: Path, words: list[str]) -> int:
    """Start a run and kill -9 a rank of it after a checkpoint; the steps that it had taken."""
    job = Foreground("grpo.py", 2, *words, "steps=1000", "checkpoint.every=2", f"run_dir={path}")
    job.wait_for(lambda: (path / "checkpoints" / "step-2").exists())
    os.kill(job.ranks()[1], signal.SIGKILL)
    _, err = job.popen.communicate(timeout=60)
    assert job.popen.returncode != 0, err
    return steps_of(path)[-1]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[str, tuple[Run, Run]]:
    """By family: a run that was killed, and resumed to take one step more than it had; and the same
    run, never killed.
    """
    root, asked = tmp_path_factory.mktemp("families"), {}
    for family, variant in RUNNING.items():
        directory, path = root / "models" / family, root / f"killed-{family}"
        save_checkpoint(directory, variant)
        words = [*WORDS, f"model.path={directory}"]
        steps = f"steps={killed(path, words) + 1}"
        asked[f"{family} again"] = ("grpo", [f"resume={path}", steps])
        asked[family] = ("grpo", [*words, steps])
    made = runs(root, 2, asked)
    return {
        family: (Run(root / f"killed-{family}", made[f"{family} again"].output), made[family])
        for family in RUNNING
    }


@pytest.mark.parametrize("family", RUNNING)
def test_killed_and_resumed_is_the_run_that_was_never_killed(both, family):
    resumed, uninterrupted = both[family]
    assert "resumed from" in resumed.output
    compared = compare_runs(resumed.path, uninterrupted.path)
    assert compared.first is None
    steps = uninterrupted.metrics[-1]["step"]
    assert (compared.steps, compared.samples) == (steps + 1, len(resumed.kept))
    assert len(resumed.samples) == steps * 4 * 4
    lines = uninterrupted.metrics[1:]
    assert len({line["digest/weights"] for line in lines}) == steps, "a step without a gradient"
    assert all(line["logprob_diff/max"] == 0 for line in lines)
