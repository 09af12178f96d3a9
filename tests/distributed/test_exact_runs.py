"""Real runs with the batch-invariant switch: trainer and generator agree to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import Run, launch

SMALL = ["steps=2", "eval.every=0", "eval.num_prompts=8", "log.tensorboard=false"]


LAYOUTS = {
    "1+3": ["trainer.dp_shard=1", "generator.dp=3", "num_prompts=18"],
    # without the switch: the control of test_recipes
    "2+2, tp differs": ["trainer.dp_shard=2", "trainer.tp=1", "generator.tp=2", "num_prompts=16"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_trainer_and_generator_agree_to_the_bit_in_a_real_run(name, tmp_path: Path):
    path = tmp_path / "run"
    words = [*SMALL, *LAYOUTS[name], "mesh.mode=split", "batch_invariant=true", f"run_dir={path}"]
    done = launch("recipes/grpo.py", 4, "conf=qwen3_tiny", *words)
    steps = Run(path, done.stdout).metrics[1:]
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["tokens/trained"] > 200
        assert metrics["logprob_diff/max"] == 0
        assert metrics["ratio/max"] == metrics["ratio/mean"] == 1
