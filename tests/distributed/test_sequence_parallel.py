"""Sequence parallelism in a real run; test_parallel_model.py has its bits, layout by layout."""

from __future__ import annotations

from pathlib import Path

from launching import run

SMALL = ["num_prompts=16", "steps=2", "eval.num_prompts=8", "log.tensorboard=false"]
LAYOUT = ["trainer.tp=2", "trainer.dp_shard=2", "trainer.sequence_parallel=true"]
EXACT = ["batch_invariant=true", "kl_coef=0.1"]


def test_a_sequence_parallel_run_is_exact_to_the_bit(tmp_path: Path):
    """Two steps with a reference; the generator is without tensor parallelism."""
    steps = run("recipes/grpo.py", tmp_path / "run", 4, "conf=qwen3_tiny", *SMALL, *LAYOUT, *EXACT)
    first, second = steps.metrics[1:]
    for metrics in (first, second):
        assert metrics["tokens/trained"] > 200
        assert metrics["logprob_diff/max"] == 0
        assert metrics["ratio/max"] == metrics["ratio/mean"] == 1
    # the policy starts as the reference, and moves
    assert first["kl"] == 0 < second["kl"]
