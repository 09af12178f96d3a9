"""Whole runs of a model with one kv head on two tensor-parallel ranks, which share it."""

from __future__ import annotations

import json

import pytest
from launching import runs
from safetensors.torch import load_file
from shared_heads import one_kv_head

WORDS = [
    "conf=qwen3_tiny", "num_prompts=4", "group_size=4", "generator.max_new_tokens=8",
    "model.max_length=64", "log.samples=-1", "batch_invariant=true", "eval.every=0",
    "eval.num_prompts=4", "log.tensorboard=false",
]  # fmt: skip
TP = ["trainer.tp=2", "trainer.dp_shard=1", "generator.tp=2"]
EXACT = ["check=strict", "steps=2", "checkpoint.every=1", "sync.verify=every"]
VALIDATED = ["validate.sequences=17", "validate.steps=1", "validate.layouts=cover"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Runs by name; `resumed` continues `shared`, in its directory, on ranks that share nothing."""
    root = tmp_path_factory.mktemp("shared")
    words = [*WORDS, *one_kv_head(root / "source")]
    return runs(root, 2, {
        "apart": ("grpo", [*words, *EXACT, "trainer.dp_shard=2"]),
        "shared": ("grpo", [*words, *EXACT, *TP]),
        "resumed": ("grpo", [f"resume={root}/shared/run", "trainer.tp=1", "trainer.dp_shard=2",
                             "generator.tp=1", "steps=3"]),
        "validated": ("validate", [*words, *VALIDATED, *TP, f"run_dir={root}/validated/run"]),
    })  # fmt: skip


def test_both_roles_sample_and_score_the_bits_of_ranks_that_share_nothing(seen):
    """check=strict compares every logprob of trainer and generator."""
    apart, shared = seen["apart"], seen["shared"]
    assert len(shared.answers(1)) == 16 and shared.answers(1) == apart.answers(1)
    for metrics in shared.metrics[1:3]:
        assert metrics["logprob_diff/max"] == 0 and metrics["tokens/trained"] > 20
    for key in ("loss", "grad_norm", "entropy"):
        assert shared.metrics[1][key] == pytest.approx(apart.metrics[1][key], rel=1e-5)


def test_every_step_changes_the_weights_and_the_export_has_the_one_head(seen):
    digests = [line["digest/weights"] for line in seen["shared"].metrics[1:3]]
    assert len(set(digests)) == 2
    tensors = load_file(seen["shared"].path / "model" / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (32, 128)


def test_a_checkpoint_resumes_on_another_layout(seen):
    assert "the digests of weights and moments match" in seen["resumed"].output
    assert [line["step"] for line in seen["shared"].metrics][-1] == 3


def test_the_validation_holds(seen):
    report = json.loads((seen["validated"].path / "validation.json").read_text())
    held = [check for check in report["checks"] if check["result"] == "pass"]
    assert {check["rung"] for check in held} >= {"L0", "L1", "L2", "L3"}
    assert all(check["tally"]["compared"] > 0 for check in held)
    assert not [check for check in report["checks"] if check["result"] == "fail"]
