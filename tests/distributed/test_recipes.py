"""Real runs of grpo and evaluate: split, colocated, alone; exact to the bit where they should be.

A run is made once, in one launch with all others on as many ranks, and looked at by several tests.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import OF_A_LAUNCH, Run
from launching import runs as run_all
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mesh.config.schema import PACKAGE_DATA
from mesh.layout.reshard import Block
from mesh.model.families import TINY
from mesh.model.hf import hf_names
from mesh.model.layouts import weight_names
from mesh.rl.advantages import group_advantages
from mesh.runs.compare import untimed
from mesh.weights.digest import block_digest

SHIPPED = PACKAGE_DATA / "qwen3_tiny"
SMALL = ["conf=qwen3_tiny", "group_size=4", "eval.num_prompts=32", "eval.every=0", "log.samples=-1"]
# by token, the loss of a step is not 0 where all ratios are 1
COMPARED = [*SMALL, "num_prompts=16", "aggregation=token", "steps=2"]
EXACT = [
    "conf=qwen3_tiny", "steps=2", "eval.every=0", "eval.num_prompts=8", "log.tensorboard=false",
    "batch_invariant=true",
]  # fmt: skip
RUNS = {  # of grpo by the number of ranks, which share a launch
    1: {"alone": [*COMPARED, "waves=4"]},
    2: {
        "colocated": [*COMPARED, "steps=3", "eval.every=2"],
        "split": [*COMPARED, "mesh.mode=split", "trainer.activation_checkpointing=full"],
        "masked": [*SMALL, "num_prompts=16", "steps=2", "generator.tp=2",
                   "generator.max_new_tokens=4", "truncated=mask", "truncated_reward=-0.5"],
        "all_masked": [*SMALL, "num_prompts=4", "steps=4", "waves=2", "trainer.weight_decay=0.1",
                       "generator.max_new_tokens=1", "generator.temperature=0.2",
                       "truncated=mask", "truncated_reward=1"],
    },
    4: {
        "split_tp": [*COMPARED, "mesh.mode=split", "trainer.dp_shard=2", "generator.tp=2",
                     "waves=2", "kl_coef=0.01", "drop_equal_groups=true"],
        "split_3_1": [*SMALL, "mesh.mode=split", "trainer.dp_shard=3", "num_prompts=63",
                      "group_size=2", "steps=2"],
        "exact_1_3": [*EXACT, "mesh.mode=split", "trainer.dp_shard=1", "generator.dp=3",
                      "num_prompts=18"],
        # without the switch: the control `split_tp`
        "exact_tp": [*EXACT, "mesh.mode=split", "trainer.dp_shard=2", "generator.tp=2",
                     "num_prompts=16"],
        # the generator is without tensor parallelism
        "exact_sp": [*EXACT, "trainer.tp=2", "trainer.dp_shard=2", "kl_coef=0.1",
                     "trainer.sequence_parallel=true", "num_prompts=16"],
    },
}  # fmt: skip
NUM_RANKS = {name: num_ranks for num_ranks, named in RUNS.items() for name in named}
METRICS = {
    "reward/mean", "logprob_diff/max", "logprob_diff/mean", "loss", "grad_norm", "entropy",
    "response_length/mean", "clip_fraction", "digest/prompts", "digest/weights", "equal_groups",
    "seconds/generate", "seconds/exchange", "seconds/train", "seconds/sync",
    "tokens_per_second/generate", "tokens_per_second/train", "host_gb", "sync/gb",
}  # fmt: skip
EVAL = {
    "eval/accuracy", "eval/accuracy_greedy", "eval/pass@1", "eval/pass@4", "eval/majority@4",
    "eval/reward", "eval/response_length/mean", "eval/response/truncated",
}  # fmt: skip


def evaluations(num_ranks: int, root: Path) -> dict[str, tuple[str, list[str]]]:
    """Of one prompt, and on two ranks of what the run `colocated` has made by then."""
    words = ["conf=qwen3_tiny", "eval.output=eval.json"]
    asked = {f"one prompt on {num_ranks}": ("evaluate", [*words, "eval.num_prompts=1"])}
    if num_ranks == 2:
        made = [f"model.path={root / 'colocated' / 'run' / 'model'}", "eval.num_prompts=32"]
        asked["evaluated"] = ("evaluate", [*words, *made])
    return asked if num_ranks < 4 else {}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launched(num_ranks): all runs on so many ranks, launched at the first call."""

    @cache
    def launched_on(num_ranks: int) -> dict[str, Run]:
        root = tmp_path_factory.mktemp(f"on_{num_ranks}")
        asked = {name: ("grpo", words) for name, words in RUNS[num_ranks].items()}
        return run_all(root, num_ranks, asked | evaluations(num_ranks, root))

    return launched_on


@pytest.fixture(scope="module")
def runs(launched):
    """runs(name): the run of grpo of that name."""
    return lambda name: launched(NUM_RANKS[name])[name]


def digest_of_directory(path) -> str:
    """`digest/weights` of an exported model, worked out from its file."""
    stored = load_file(path / "model.safetensors")
    total = 0
    for ours, theirs in hf_names(sorted(weight_names(TINY)), TINY).items():
        weight = stored[theirs]
        whole = Block((0,) * weight.dim(), tuple(weight.shape))
        total += int(block_digest(ours, weight, whole, weight.shape))
    return f"{total % (1 << 64):016x}"


def test_run_directory_and_last_line(runs):
    made = runs("colocated")
    names = {item.name for item in made.path.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl.gz", "model",
        "tensorboard", "lock", "timeline.jsonl",
    }  # fmt: skip
    assert list((made.path / "tensorboard").iterdir())
    assert made.output.splitlines()[-1].startswith("done  3/3 steps  eval ")
    assert made.output.splitlines()[-1].endswith(f"run {made.path}")


def test_metrics_of_every_step_without_gap(runs):
    metrics = runs("colocated").metrics
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert metrics[0].keys() == {"step", "seconds/eval", "host_gb"} | EVAL
    for line in metrics[1:]:
        assert line.keys() >= METRICS
        assert line["tokens/trained"] == line["tokens/generated"] > 0
        assert 0 <= line["logprob_diff/mean"] <= line["logprob_diff/max"] < 1e-4
        assert line["clip_fraction"] == 0
    evaluated = [line["step"] for line in metrics if line.keys() >= EVAL]
    assert evaluated == [0, 2, 3]
    assert len({line["digest/weights"] for line in metrics[1:]}) == 3


def test_samples_are_the_rollouts_and_explain_the_reward(runs):
    made = runs("alone")
    assert len(made.samples) == 2 * 16 * 4
    for step in (1, 2):
        samples = [s for s in made.samples if s["step"] == step]
        ids = [(s["prompt_id"], s["sample_id"]) for s in samples]
        assert sorted(ids) == [(p, g) for p in range(16) for g in range(4)]
        assert all(s["prompt"] == s["answer"][::-1] + ">" for s in samples)
        assert all(s["reward"] == float(s["response"] == s["answer"]) for s in samples)
        mean = sum(s["reward"] for s in samples) / len(samples)
        assert made.metrics[step]["reward/mean"] == mean
        cut = sum(s["finish_reason"] == "length" for s in samples) / len(samples)
        assert made.metrics[step]["truncated"] == cut


def test_exported_model_is_the_last_step_and_loads_in_transformers(runs):
    made = runs("colocated")
    exported = digest_of_directory(made.path / "model")
    assert exported == made.metrics[-1]["digest/weights"]
    assert exported != digest_of_directory(SHIPPED)
    model, info = AutoModelForCausalLM.from_pretrained(
        made.path / "model", output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["colocated", "split", "split_tp"])
def test_first_step_draws_the_same_tokens_on_any_layout(runs, name):
    """What all ranks own is written down, so the whole step can be compared."""
    alone, other = runs("alone").answers(1), runs(name).answers(1)
    assert len(other) == 16 * 4
    assert other == alone
    assert runs(name).metrics[1]["reward/mean"] == runs("alone").metrics[1]["reward/mean"]
    assert untimed(runs(name).metrics[0]) == untimed(runs("alone").metrics[0])


@pytest.mark.parametrize("name", ["colocated", "split"])
def test_first_update_is_the_same_to_rounding_on_any_layout_and_number_of_waves(runs, name):
    alone, other = runs("alone").metrics, runs(name).metrics
    for key in ("loss", "grad_norm", "entropy"):
        assert abs(alone[1][key]) > 1e-3
        assert other[1][key] == pytest.approx(alone[1][key], rel=1e-4)
    assert other[1]["tokens/trained"] == alone[1]["tokens/trained"]
    assert other[2]["entropy"] == pytest.approx(alone[2]["entropy"], rel=1e-3)


@pytest.mark.parametrize("name", ["exact_1_3", "exact_tp", "exact_sp"])
def test_trainer_and_generator_agree_to_the_bit(runs, name):
    steps = runs(name).metrics[1:]
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["tokens/trained"] > 200
        assert metrics["logprob_diff/max"] == 0
        assert metrics["ratio/max"] == metrics["ratio/mean"] == 1


def test_control_without_the_switch_logprobs_differ(runs):
    """The layout of `exact_tp`."""
    assert all(line["logprob_diff/max"] > 0 for line in runs("split_tp").metrics[1:])


def test_a_policy_starts_exactly_as_its_reference_and_moves(runs):
    first, second = runs("exact_sp").metrics[1:]
    assert first["kl"] == 0 < second["kl"]


def test_dropped_groups_are_not_trained_on_and_the_kl_starts_at_zero(runs):
    first, second = runs("split_tp").metrics[1:]
    assert first["kl"] < 1e-9 < second["kl"]
    rewards = runs("alone").answers(1)
    mixed = [
        p for p in range(16) if len({rewards[p, g][1] for g in range(4)}) > 1
    ]  # the same tokens, as tested above
    assert first["equal_groups"] == 1 - len(mixed) / 16 > 0
    assert 0 < first["tokens/trained"] < first["tokens/generated"]


def test_truncated_responses_are_masked_and_have_a_reward_of_their_own(runs):
    """Counted by hand from the samples."""
    made = runs("masked")
    for step in (1, 2):
        samples, metrics = [s for s in made.samples if s["step"] == step], made.metrics[step]
        cut = [s for s in samples if s["finish_reason"] == "length"]
        whole = [s for s in samples if s["finish_reason"] == "stop"]
        assert len(samples) == 64 == len(cut) + len(whole) and cut and whole
        assert {s["reward"] for s in cut} == {-0.5}
        assert all(s["reward"] == float(s["response"] == s["answer"]) for s in whole)
        assert metrics["response/truncated"] == len(cut) / 64
        masked = metrics["tokens/generated"] - metrics["tokens/trained"]
        assert masked == 4 * len(cut) < metrics["tokens/generated"]
        ordered = sorted(samples, key=lambda s: (s["prompt_id"], s["sample_id"]))
        rewards = torch.tensor([s["reward"] for s in ordered], dtype=torch.float64).view(16, 4)
        found = torch.tensor([s["advantage"] for s in ordered]).view(16, 4)
        assert torch.equal(group_advantages(rewards, "std"), found), "over whole groups"
    assert made.metrics[2]["grad_norm"] > 0 == made.metrics[2]["steps_without_signal"]


def test_a_run_whose_responses_are_all_masked_keeps_its_weights(runs):
    made = runs("all_masked")
    for step in range(1, 5):
        line = made.metrics[step]
        assert (line["response/truncated"], line["reward/mean"]) == (1, 1)
        assert line["tokens/trained"] == line["grad_norm"] == line["loss"] == 0
        assert line["steps_without_signal"] == step and line["lr"] > 0
    assert {line["digest/weights"] for line in made.metrics[1:]} == {digest_of_directory(SHIPPED)}
    evaluated = [line["eval/accuracy"] for line in (made.metrics[0], made.metrics[-1])]
    assert evaluated == [0, 0], "an evaluation scores as the task says"
    warned = [line for line in made.output.splitlines() if line.startswith("warning: ")]
    assert [line.split(" of ")[0].split(" in ")[0] for line in warned] == [
        "warning: 100%", "warning: 3 steps",
    ]  # fmt: skip
    assert "truncated 100%" in made.output and "no signal 4  " in made.output


def test_unequal_submeshes_train_on_every_prompt(runs):
    made = runs("split_3_1")
    assert [line["step"] for line in made.metrics] == [0, 1, 2]
    for line in made.metrics[1:]:
        assert line["tokens/trained"] == line["tokens/generated"] > 0
    assert made.answers(1).keys() == {(i, sample) for i in range(63) for sample in range(2)}
    assert digest_of_directory(made.path / "model") == made.metrics[-1]["digest/weights"]


def test_evaluate_alone_gives_the_numbers_of_the_run(launched):
    made, evaluated = launched(2)["colocated"], launched(2)["evaluated"]
    metrics = evaluation_of(evaluated)
    intervals = metrics.pop("intervals")
    assert intervals.keys() == EVAL
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert metrics == {key: made.metrics[-1][key] for key in EVAL}
    low, high = intervals["eval/accuracy"]
    shown = f"{metrics['eval/accuracy']:.4f}  [{low:.4f}, {high:.4f}]"
    assert f"  eval/accuracy              {shown}" in evaluated.output
    written = {item.name for item in evaluated.path.parent.iterdir()}
    assert written - OF_A_LAUNCH == {"eval.json"}


def test_fewer_prompts_than_replicas_leave_one_an_empty_share(launched):
    """A replica without prompts joins in the reduction: the numbers are those of one rank."""
    one, two = (evaluation_of(launched(n)[f"one prompt on {n}"]) for n in (1, 2))
    assert one == two


def evaluation_of(evaluated: Run) -> dict[str, Any]:
    return json.loads((evaluated.path.parent / "eval.json").read_text())
