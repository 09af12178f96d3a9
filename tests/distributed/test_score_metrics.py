"""Scores with parts from a scoring process to metrics, samples and evaluations, in three layouts of
two ranks. Three runs of two small steps, about 20 s.
"""

from __future__ import annotations

import math

import pytest
from launching import Run, runs

WORDS = [
    "conf=qwen3_tiny", "task=user_tasks:Parted", "num_prompts=8", "group_size=4", "steps=2",
    "eval.num_prompts=6", "eval.num_samples=2", "log.tensorboard=false", "log.samples=-1",
    "generator.max_new_tokens=6",
]  # fmt: skip
LAYOUTS = {
    "colocated": [],
    "split": ["mesh.mode=split"],
    "tp": ["generator.tp=2", "trainer.tp=2", "trainer.dp_shard=1"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    asked = {name: ("grpo", [*WORDS, *more]) for name, more in LAYOUTS.items()}
    return runs(tmp_path_factory.mktemp("scores"), 2, asked)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_the_means_of_the_samples_parts(made, layout):
    run = made[layout]
    for line in run.metrics[1:]:
        samples = [s for s in run.samples if s["step"] == line["step"]]
        assert len(samples) == 32
        assert line["reward/share"] == mean([s["parts"]["share"] for s in samples])
        assert line["reward/tokens"] == line["response_length/mean"]
        firsts = [s["parts"]["first"] for s in samples if s["response"]]
        assert line["reward/first"] == mean(firsts)
        assert line["reward/correct"] == mean([s["correct"] for s in samples])
        assert 0 < line["reward/share"] < 1 and 0 < line["reward/correct"] < 1
    for sample in run.samples:
        pairs = zip(sample["response"], sample["answer"], strict=False)
        share = sum(a == b for a, b in pairs) / len(sample["answer"])
        assert sample["parts"]["share"] == share and sample["reward"] == 0.9 * share


def test_evaluations_have_parts_and_count_what_the_score_calls_correct(made):
    """A reward is never 1 here."""
    for run in made.values():
        first = run.metrics[0]
        assert first["eval/accuracy"] > 0 and first["eval/reward"] < 0.9
        assert first["eval/reward/share"] == pytest.approx(first["eval/reward"] / 0.9)
        assert "no response was correct" not in run.output
    names = ("accuracy", "accuracy_greedy", "reward", "reward/share", "reward/first")
    found = [[run.metrics[0][f"eval/{name}"] for name in names] for run in made.values()]
    assert found[0] == found[1] == found[2], "the weights of the start are the same"


def test_the_line_of_a_step_shows_parts(made):
    line = next(
        line for line in made["split"].output.splitlines() if line.startswith("step    2/2")
    )
    value = made["split"].metrics[2]["reward/first"]
    assert f"  reward/correct {made['split'].metrics[2]['reward/correct']:.3f}  " in line
    assert f"  reward/first {value:.3f}  reward/share " in line and "reward/tokens" not in line
