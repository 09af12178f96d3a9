"""Training with vLLM: the recipe's own steps on four ranks, layout by layout, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch, run
from programs.vllm_program import FAILURE, LAYOUTS, STEPS

from mesh.engine.vllm.checks import install_problems

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)  # four ranks that import vLLM
WORDS = ["conf=qwen3_tiny", "num_prompts=4", "group_size=4", "generator.max_sequences=8"]
SHM = Path("/dev/shm")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(what each rank saw, output of the program, which ends with a failure)."""
    directory = tmp_path_factory.mktemp("vllm")
    words = [*WORDS, "batch_invariant=true"]
    program = "tests/programs/vllm_program.py"
    result = launch(program, 1, str(directory), *words, status=1, seconds=840)
    output = result.stdout + result.stderr
    assert (directory / "3.json").exists(), output
    seen = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(4)]
    return seen, output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_with_vllm_are_those_with_the_native_engine(program, layout):
    """L6 in the loop, with weights that change: tokens, logprobs, and the weights they lead to."""
    mode, dp, tp = LAYOUTS[layout]
    on_generator = range(2, 4) if mode == "split" else range(4)
    on_trainer = range(2) if mode == "split" else range(4)
    for rank, seen in enumerate(program[0]):
        native, vllm = seen[f"native {layout}"], seen[f"vllm {layout}"]
        engines = ("NativeEngine", "VllmEngine") if rank in on_generator else ("NoneType",) * 2
        assert (native["name"], vllm["name"]) == engines
        assert len(vllm["generated"]) == (STEPS * 16 // dp if rank in on_generator else 0)
        assert vllm["generated"] == native["generated"]
        for step, (mine, theirs) in enumerate(zip(vllm["metrics"], native["metrics"], strict=True)):
            if rank in on_trainer:
                assert mine["logprob_diff/max"] == 0 and mine["ratio/max"] == 1, (rank, step)
                assert mine["reward/mean"] == theirs["reward/mean"]
            assert mine["digest/weights"] == theirs["digest/weights"]
        changed = {metrics["digest/weights"] for metrics in vllm["metrics"]}
        assert len(changed) == STEPS
    assert len(program[0][3][f"vllm {layout}"]["generated"][0]["tokens"]) > 0


@pytest.mark.parametrize("name", ["own", "own shared"])
def test_vllms_own_model_trains_with_synced_weights(program, name):
    """Fused weights of two tensor-parallel ranks follow every step: digests, and close logprobs.
    Where the ranks share a kv head, vLLM holds a copy of it on each.
    """
    for rank, seen in enumerate(program[0]):
        for metrics in seen[name]["metrics"]:
            assert (rank > 1 and name == "own") or 0 < metrics["logprob_diff/max"] < 1e-4
        assert len({m["digest/weights"] for m in seen[name]["metrics"]}) == STEPS
    assert program[0][2][name]["generated"] == program[0][3][name]["generated"] != []


def test_an_engine_that_fails_ends_all_ranks_with_its_message(program):
    assert f"RuntimeError: {FAILURE}" in program[1] and "rank 2 failed" in program[1]


def test_nothing_stays_in_shared_memory(program):
    """Also after ranks that ended at once, as a kill would end them."""
    assert [file.name for file in SHM.glob("*mesh-vllm-*")] == []


def test_the_validation_holds_with_vllm(tmp_path):
    words = ["conf=qwen3_tiny", "engine=vllm", "generator.max_new_tokens=8", "validate.steps=2"]
    words += ["validate.sequences=33", f"run_dir={tmp_path / 'run'}"]
    launch("recipes/validate.py", 1, *words, seconds=800)
    report = json.loads((tmp_path / "run" / "validation.json").read_text())
    held = [check for check in report["checks"] if check["result"] == "pass"]
    assert all(check["tally"]["compared"] > 0 for check in held)
    assert {check["rung"] for check in held} == {"L0", "L1", "L2", "L6"}


def test_the_command_trains_strictly_and_ends_well(tmp_path):
    words = [*WORDS, "engine=vllm", "generator.tp=2", "batch_invariant=true", "check=strict"]
    words += ["steps=2", "eval.every=0", "eval.num_prompts=4", "eval.num_samples=1"]
    made = run("recipes/grpo.py", tmp_path / "run", 2, *words)
    assert [line["logprob_diff/max"] for line in made.metrics[1:]] == [0, 0]
    assert "vllm" not in made.output.lower(), "vLLM's own lines belong to nobody's output"
    assert (made.path / "model" / "model.safetensors").is_file()
