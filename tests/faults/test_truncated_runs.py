"""A real run of conversations over truncated sets: exact, killed and resumed, replayed.

About a minute on two ranks.
"""

from __future__ import annotations

import pytest
from foreground import killed_run
from launching import Run, runs

from mesh.runs.compare import compare_runs

pytestmark = pytest.mark.timeout(900)  # of a slow machine; each launch has a limit of its own
WORDS = [
    "conf=qwen3_tiny", "task=talking_tasks:Chatty", "reward.workers=0", "task_args.min_length=3",
    "task_args.max_length=4", "model.max_length=64", "num_prompts=8", "group_size=4",
    "eval.every=0", "eval.num_prompts=8", "eval.num_samples=1", "log.tensorboard=false",
    "log.samples=-1", "batch_invariant=true", "check=strict", "truncated_logprobs=true",
    "generator.top_k=40", "generator.top_p=0.9", "updates_per_step=2", "loss=gspo",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    """A run that was killed and resumed, a replay of its last step, the run that was never killed,
    and one with the same draws and the logprobs of whole distributions."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "killed"
    steps = killed_run(path, 2, WORDS) + 2
    asked = {
        "again": ("grpo", [f"resume={path}", f"steps={steps}"]),
        "replayed": ("replay", [str(path), f"step={steps}"]),
        "whole": ("grpo", [*WORDS, f"steps={steps}"]),
        "untruncated": ("grpo", [*WORDS, "truncated_logprobs=false", "steps=1"]),
    }
    found = runs(root, 2, asked)
    return found | {"killed": Run(path, found["again"].output)}


def test_killed_and_resumed_is_the_run_that_was_never_killed(made):
    killed, whole = made["killed"], made["whole"]
    compared = compare_runs(killed.path, whole.path)
    assert compared.first is None and compared.steps == len(whole.metrics) > 5
    assert "resumed from" in killed.output
    assert killed.samples == whole.samples


def test_a_step_is_replayed_to_the_bit(made):
    assert "equal to the bit" in made["replayed"].output.splitlines()[-1]


def test_every_turn_is_scored_over_the_sets_of_the_policy_that_drew_it(made):
    """check=strict has compared every wave, and later updates have another ratio."""
    for line in made["whole"].metrics[1:]:
        assert line["logprob_diff/max"] == 0 and line["turns/max"] == 3
        assert (line["update/1/ratio/max"], line["update/1/approx_kl"]) == (1, 0)
    first, other = (made[name].metrics[1] for name in ("whole", "untruncated"))
    assert made["whole"].answers(1) == made["untruncated"].answers(1), "control: the same draws"
    assert first["entropy"] < other["entropy"] - 0.1
    assert any(line["update/2/ratio/max"] > 1 for line in made["whole"].metrics[1:])
