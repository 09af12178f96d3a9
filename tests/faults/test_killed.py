"""Three ranks, two that train and one that generates: one of them is killed while it writes the
best model, the logs are lost, and the resumed run is the one that was never killed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from launching import REPOSITORY, Run, launch

from mesh.checkpoint.files import Best, read_index
from mesh.runs.compare import compare_runs
from tools.chaos.checks import finished_problems

pytestmark = pytest.mark.timeout(900)  # of a slow machine; each launch has a limit of its own
STEPS, KILLED_AT, PROMPTS, GROUP = 6, 6, 4, 2
WORDS = [
    "conf=qwen3_tiny", f"num_prompts={PROMPTS}", f"group_size={GROUP}", f"steps={STEPS}",
    "eval.every=1", "eval.num_prompts=8", "eval.num_samples=1", "checkpoint.every=2",
    "log.tensorboard=false", "log.samples=-1", "batch_invariant=true", "kl_coef=0.01",
    "mesh.mode=split", "trainer.dp_shard=2", "task=user_tasks:Foreseen",
    "reward.workers=0", "generator.max_new_tokens=5",
]  # fmt: skip
TESTS = REPOSITORY / "tests"  # of user_tasks
KILLED = "tests/programs/killed_program.py"


def names_in(path: Path) -> set[str]:
    return {item.name for item in path.iterdir()}


def test_killed_while_it_writes_the_best_model(tmp_path):
    """Half of it is on the disk by then. The best one of step 5 came after the checkpoint."""
    path, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    words = [str(uninterrupted), str(path), str(KILLED_AT), *WORDS]
    killed = launch(KILLED, 3, *words, path=TESTS, status=1)
    half = path / "best" / f"step-{KILLED_AT}.partial" / "shard-0.safetensors"
    assert time.time() - half.stat().st_mtime < 30
    assert "rank 0 (process" in killed.stderr
    assert "was killed, or crashed outside Python" in killed.stderr
    assert {"step-5", "step-6.partial"} <= names_in(path / "best")
    (path / "metrics.jsonl").unlink()
    os.truncate(path / "samples.jsonl.gz", 100)

    resumed = launch("recipes/grpo.py", 3, f"resume={path}", path=TESTS).stdout
    assert f"resumed from {path}/checkpoints/step-" in resumed
    assert f"best: eval/accuracy 0.750 of step 6, {path}/best/step-6" in resumed
    assert finished_problems(path, STEPS, PROMPTS * GROUP) == []
    digests = {line["digest/weights"] for line in Run(path, resumed).metrics[1:]}
    assert len(digests) == STEPS
    compared = compare_runs(path, uninterrupted)
    assert compared.first is None
    models = [names_in(path / "model"), names_in(path / "best" / "step-6")]
    assert models[0] == models[1] and compared.files == 2 * len(models[0])
    assert read_index(path / "checkpoints" / "step-6").best == Best(6, 6 / 8)
    assert names_in(path / "best") == names_in(uninterrupted / "best") == {"step-4", "step-6"}
    assert (path / "environment-2.json").is_file()
