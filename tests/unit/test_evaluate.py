"""pass@k against a count of all subsets, and the sums that evaluation reduces over ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from user_tasks import Short

from mesh.config.loading import load_conf
from mesh.lifecycle.process import Process
from mesh.program.assembly import check
from mesh.program.plan import Plan
from mesh.roles.evaluation import _sums, pass_at_k
from mesh.tasks import draw_held_out
from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Rollout


def generating(process: Process, *words: str, held_out: bool = True) -> Plan:
    """A start on 3 ranks of a program that does not train."""
    conf = load_conf(["conf=qwen3_tiny", *words])[1]
    return check(conf, replace(process, world_size=3), training=False, held_out=held_out)


@pytest.mark.parametrize("num_samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples):
    for num_correct in range(num_samples + 1):
        right = [index < num_correct for index in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(combinations(right, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_1_is_the_mean_reward_and_k_of_all_is_any():
    assert [pass_at_k(4, correct, 1) for correct in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [pass_at_k(4, correct, 4) for correct in range(5)] == [0, 1, 1, 1, 1]


def rollout(prompt_id: int, sample_id: int, reward: float) -> Rollout:
    return Rollout(prompt_id, sample_id, (1,), (2,), (-0.5,), reward, "stop")


def test_sums_by_hand():
    """Three prompts with 0, 1 and 2 right of 2; partial credit is not right, extra credit is."""
    rewards = {7: (0.99, 0.0), 8: (1.0, 0.5), 9: (1.0, 1.5)}
    rollouts = [rollout(p, g, rewards[p][g]) for p in rewards for g in range(2)]
    assert _sums(rollouts, 2, [1, 2]) == [0 + 0.5 + 1, 0 + 1 + 1, 3]
    assert _sums([], 2, [1, 2]) == [0, 0, 0]


def test_held_out_prompts_are_those_of_the_task_and_as_many_as_asked():
    assert draw_held_out(SpellBackward(0), 5) == SpellBackward(0).eval_prompts(5)
    with pytest.raises(ValueError, match="eval_prompts was asked for 5 prompts and gave 4"):
        draw_held_out(Short(0), 5)


def test_what_only_training_asks_does_not_keep_a_program_from_generating(process):
    long = ["task_args.min_length=30", "task_args.max_length=30"]
    words = ["num_prompts=64", "trainer.microbatch_tokens=1", "task=user_tasks:ShortTraining"]
    plan = generating(process, *words)
    assert plan.trainer.optimizer is None and not plan.trainer.reference
    generating(process, *long, "task=user_tasks:Short", held_out=False)
    with pytest.raises(ValueError, match=r"the prompt '[a-z]{30}>' has 31 tokens"):
        generating(process, *long)
    with pytest.raises(ValueError, match="eval_prompts was asked for 256 prompts and gave 255"):
        generating(process, "task=user_tasks:Short")
    with pytest.raises(ValueError, match="trainer.tp=3"):
        generating(process, "trainer.tp=3")
