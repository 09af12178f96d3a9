"""pass@k against a count of all subsets, and the sums that evaluation reduces over ranks."""

from __future__ import annotations

from itertools import combinations

import pytest

from mesh.evaluate import _sums, pass_at_k
from mesh.types import Rollout


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
