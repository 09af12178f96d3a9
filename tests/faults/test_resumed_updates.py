"""Real runs with several updates a step: exact, killed and resumed, replayed, on one rank and two.

About a minute on two cores.
"""

from __future__ import annotations

import pytest
from foreground import killed_run
from launching import Run, runs

from mesh.runs.compare import compare_runs

pytestmark = pytest.mark.timeout(900)  # of a slow machine; each launch has a limit of its own
UPDATES = 4
WORDS = [
    "conf=qwen3_tiny", "num_prompts=8", "group_size=4", "eval.every=0", "eval.num_prompts=8",
    "eval.num_samples=1", "log.tensorboard=false", "log.samples=-1", "batch_invariant=true",
    "check=strict", f"updates_per_step={UPDATES}", "aggregation=token", "trainer.warmup_steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    """A run that was killed and resumed, a replay of its last step, the run that was never killed,
    and one on a rank alone."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "killed"
    steps = killed_run(path, 2, WORDS) + 2
    asked = {
        "again": ("grpo", [f"resume={path}", f"steps={steps}"]),
        "replayed": ("replay", [str(path), f"step={steps}"]),
        "whole": ("grpo", [*WORDS, f"steps={steps}"]),
    }
    found = runs(root, 2, asked) | runs(root, 1, {"alone": ("grpo", [*WORDS, "steps=2"])})
    return found | {"killed": Run(path, found["again"].output)}


def test_killed_and_resumed_is_the_run_that_was_never_killed(made):
    killed, whole = made["killed"], made["whole"]
    compared = compare_runs(killed.path, whole.path)
    assert compared.first is None and compared.steps == len(whole.metrics) > 5
    assert "resumed from" in killed.output
    steps = len(whole.metrics) - 1
    assert len({line["digest/weights"] for line in whole.metrics[1:]}) == steps


def test_a_step_is_replayed_to_the_bit(made):
    assert "equal to the bit" in made["replayed"].output.splitlines()[-1]


def test_the_first_update_is_on_policy_and_the_others_are_not(made):
    """check=strict has compared every wave before its first update."""
    for line in made["whole"].metrics[1:]:
        assert line["updates"] == UPDATES and line["logprob_diff/max"] == 0
        first = {key: line[f"update/1/{key}"] for key in ("ratio/max", "ratio/mean", "approx_kl")}
        assert first == {"ratio/max": 1, "ratio/mean": 1, "approx_kl": 0}
        assert line["update/1/clip_fraction"] == 0
    later = made["whole"].metrics[3:]
    for number in range(2, UPDATES + 1):
        # a minibatch of two equal groups has no gradient, and after it the policy is as before
        assert any(line[f"update/{number}/ratio/max"] > 1 for line in later), number
        assert any(line[f"update/{number}/approx_kl"] > 0 for line in later), number
    assert all(line["lr"] == pytest.approx(6e-4 * min(line["step"] / 3, 1))
               for line in made["whole"].metrics[1:])  # fmt: skip


def test_one_rank_makes_the_same_minibatches_as_two(made):
    """Gradients are summed in another order, which rounds otherwise."""
    alone, whole = made["alone"], made["whole"]
    assert alone.answers(1) == whole.answers(1)
    keys = [f"update/{number}/{key}" for number in range(1, UPDATES + 1)
            for key in ("loss", "grad_norm", "approx_kl", "ratio/mean")]  # fmt: skip
    for key in [*keys, "tokens/trained", "clip_fraction"]:
        mine, theirs = alone.metrics[1][key], whole.metrics[1][key]
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6), key
