"""A run with an optimizer of the user's and averaged weights, killed and resumed: L5 on the same
mesh, then on others, onto which its state is resharded.
"""

from __future__ import annotations

import json

import pytest
from foreground import steps_of
from launching import Run, launch, runs
from test_resume import WORDS, killed

from mesh.runs.compare import compare_runs

pytestmark = pytest.mark.timeout(900)
OWN = [
    "trainer.optimizer=user_optimizers:SignMomentum", "trainer.optimizer_args.beta=0.8",
    "trainer.weight_decay=0.1", "trainer.weight_decay_on=matrices", "trainer.lr=1e-4", "ema=0.9",
    "trainer.decay=cosine", "trainer.decay_steps=900", "trainer.lr_floor=0.1",
    "eval.every=2", "stop.after=500",
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Run, Run]:
    """The run that was killed and resumed for two steps more, and the one that never was."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "killed"
    steps = f"steps={killed(path, *OWN) + 2}"
    again = ("grpo", [f"resume={path}", steps])
    made = runs(root, 2, {"again": again, "never": ("grpo", [*WORDS, *OWN, steps])})
    return Run(path, made["again"].output), made["never"]


def test_killed_and_resumed_is_the_run_that_was_never_killed(both):
    """Every line of both logs, with evaluations of the averages, and the exported averages."""
    resumed, never = both
    assert compare_runs(resumed.path, never.path).first is None
    assert "the digests of weights and moments match" in resumed.output
    assert len({line["digest/weights"] for line in never.metrics[1:]}) == len(never.metrics) - 1
    assert any("eval/reward" in line for line in never.metrics[1:])


def test_its_state_is_resharded_onto_other_meshes(both):
    """Loading compares its digest with that of the mesh that saved; scalars are on all ranks."""
    path, steps = both[0].path, both[0].metrics[-1]["step"]
    said = f"resumed from {path}/checkpoints/step-%d: the digests of weights and moments match"
    words = ["trainer.tp=2", "generator.tp=2", f"steps={steps + 1}"]
    assert said % steps in launch("recipes/grpo.py", 4, f"resume={path}", *words).stdout
    words = ["mesh.mode=split", f"steps={steps + 2}"]
    assert said % (steps + 1) in launch("recipes/grpo.py", 2, f"resume={path}", *words).stdout
    assert steps_of(path) == list(range(steps + 3))
    index = json.loads((path / "checkpoints" / f"step-{steps + 2}" / "index.json").read_text())
    content = index["content"]
    assert content["digests"].keys() == {"weights", "ema", "optimizer", "reference"}
    assert {group["taken"] for group in content["optimizer"]["groups"]} == {content["updates"]}


def test_state_that_no_checkpoint_can_hold_is_refused_on_shards(tmp_path):
    """Partial sums, of which each rank has one; the third rank does not train, and ends too."""
    words = ["trainer.optimizer=user_optimizers:Partial", "mesh.mode=split", "trainer.dp_shard=2"]
    path = f"run_dir={tmp_path / 'run'}"
    ended = launch("recipes/grpo.py", 3, *WORDS, *words, path, "steps=1", status=1)
    said = "trainer.optimizer=user_optimizers:Partial: its state total/"
    assert ended.stderr.count(said) == 1 and ended.stderr.startswith(said)  # torchrun's follow
    assert "a DTensor of partial sums; call full_tensor() on it, or redistribute" in ended.stderr
