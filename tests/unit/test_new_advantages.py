"""Advantages of RLOO, MaxRL and REINFORCE++: by hand, and in float64 with torch's statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trainer import conf_of, objective_for

from mesh.rl.advantages import equal_groups, group_advantages
from mesh.rl.losses import LOSSES
from mesh.rl.objective import objective_of
from mesh.rl.step import advantages_of
from mesh.types import Outline, Wave

KINDS = {"leave_one_out", "mean", "whitened", "centred_whitened"}


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(advantages_PG: torch.Tensor, expected_PG: torch.Tensor) -> None:
    torch.testing.assert_close(advantages_PG.double(), expected_PG, rtol=1e-6, atol=1e-7)


def test_leave_one_out_by_hand():
    """Of 1, 0, 0, 1 each is compared with the mean of the other three."""
    advantages_PG = group_advantages(table([1, 0, 0, 1], [0, 0, 0, 3]), "leave_one_out")
    close(advantages_PG, table([2 / 3, -2 / 3, -2 / 3, 2 / 3], [-1, -1, -1, 3]))


def test_mean_by_hand():
    """One of four is right: its advantage is 3, as in prime-rl's example."""
    advantages_PG = group_advantages(table([1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]), "mean", 0.0)
    close(advantages_PG, table([3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0, 0, 0, 0]))
    assert group_advantages(table([2, 0]), "mean", 1.0).tolist() == [[0.5, -0.5]]


def test_whitened_by_hand():
    """Four tokens of rewards 1, 1, 1 and 0: mean 3/4, sample deviation 1/2."""
    lengths_PG = torch.tensor([[1, 2], [1, 0]])
    rewards_PG = table([1, 1], [0, 9])  # the last has no token
    advantages_PG = group_advantages(rewards_PG, "whitened", 0.0, lengths_PG)
    close(advantages_PG, table([0.5, 0.5], [-1.5, 16.5]))
    close(group_advantages(rewards_PG, "whitened", 0.5, lengths_PG), advantages_PG.double() / 2)


def test_centred_whitened_by_hand():
    """Minus their group's mean the rewards are 1/2, -1/2, 0, 0, with two tokens for the first."""
    lengths_PG = torch.tensor([[2, 1], [1, 1]])
    advantages_PG = group_advantages(table([1, 0], [7, 7]), "centred_whitened", 0.0, lengths_PG)
    deviation = math.sqrt((2 * 0.4**2 + 0.6**2 + 2 * 0.1**2) / 4)
    close(advantages_PG, table([0.4, -0.6], [-0.1, -0.1]) / deviation)


REWARDS = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.25, 3.0]), min_size=4, max_size=4),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(deadline=None)
@given(REWARDS, st.integers(0, 2**31))
def test_statistics_are_torchs_in_float64(rewards, seed):
    """Whitened: over a list that has each reward once for every token."""
    rewards_PG = table(*rewards)
    mean_P1, size = rewards_PG.mean(1, keepdim=True), rewards_PG.shape[1]
    others_PG = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / (size - 1)
    close(group_advantages(rewards_PG, "leave_one_out"), rewards_PG - others_PG)
    if not equal_groups(rewards_PG).any():
        close(group_advantages(rewards_PG, "mean", 1e-3), (rewards_PG - mean_P1) / (mean_P1 + 1e-3))
    generator = torch.Generator().manual_seed(seed)
    lengths_PG = torch.randint(1, 9, rewards_PG.shape, generator=generator)
    for kind, values_PG in (("whitened", rewards_PG), ("centred_whitened", rewards_PG - mean_P1)):
        tokens_T = values_PG.flatten().repeat_interleave(lengths_PG.flatten())
        advantages_PG = group_advantages(rewards_PG, kind, 1e-3, lengths_PG)
        expected_PG = (values_PG - tokens_T.mean()) / (tokens_T.std() + 1e-3)
        close(advantages_PG, expected_PG)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e7 + 0.1])
def test_equal_rewards_give_exactly_zero(kind, reward):
    rewards_PG = torch.full((2, 3), reward, dtype=torch.float64)
    rewards_PG[1, 0] += 1e-14  # rounding
    for eps in (1e-6, 0.0):
        assert group_advantages(rewards_PG, kind, eps).tolist() == [[0.0] * 3] * 2


def test_whitened_compares_equal_groups_with_the_step_and_the_baseline_does_not():
    rewards_PG = table([1, 1], [0, 0], [1, 0])
    assert (group_advantages(rewards_PG, "whitened")[:2].sign() == table([1, 1], [-1, -1])).all()
    assert group_advantages(rewards_PG, "centred_whitened")[:2].tolist() == [[0, 0], [0, 0]]


@settings(deadline=None)
@given(REWARDS, st.sampled_from(["leave_one_out", "mean"]), st.permutations(range(4)))
def test_bits_follow_the_own_group_only(rewards, kind, order):
    rewards_PG = table(*rewards)
    advantages_PG = group_advantages(rewards_PG, kind)
    alone_PG = torch.cat([group_advantages(row_G[None], kind) for row_G in rewards_PG])
    assert torch.equal(advantages_PG, alone_PG)
    assert torch.equal(group_advantages(rewards_PG[:, order], kind), advantages_PG[:, order])


@settings(deadline=None)
@given(REWARDS, st.sampled_from(["whitened", "centred_whitened"]), st.randoms())
def test_bits_do_not_follow_the_order_of_the_step(rewards, kind, random):
    """As exactly rounded sums; the rewards are multiples of 1/4, the lengths of up to 7."""
    rewards_PG = table(*rewards) / 3
    lengths_PG = torch.arange(rewards_PG.numel()).view(rewards_PG.shape) % 7 + 1
    order = list(range(len(rewards_PG)))
    random.shuffle(order)
    advantages_PG = group_advantages(rewards_PG, kind, 1e-6, lengths_PG)
    other_PG = group_advantages(rewards_PG[order], kind, 1e-6, lengths_PG[order])
    assert torch.equal(other_PG, advantages_PG[order])


def test_rewards_below_0_have_no_mean_to_divide_by():
    wrong = r"rewards \[1.0, -0.5\] of one group: the advantage divides by their mean, which has to"
    with pytest.raises(ValueError, match=wrong):
        group_advantages(table([1, -0.5]), "mean")


def test_rows_have_the_advantages_of_their_papers():
    expected = {
        "grpo": "std", "dr_grpo": "centred", "bnpo": "std", "dapo": "std", "rloo": "leave_one_out",
        "reinforce_pp": "whitened", "reinforce_pp_baseline": "centred_whitened", "gspo": "std",
        "cispo": "std", "sapo": "std", "max_rl": "mean",
    }  # fmt: skip
    assert {name: LOSSES[name].advantage for name in expected} == expected
    averages = {name: LOSSES[name].aggregation for name in expected}
    assert {name for name, kind in averages.items() if kind == "sequence"} == {
        "grpo", "gspo", "sapo",
    }  # fmt: skip
    assert averages["rloo"] == "sum" and averages["dr_grpo"] == "constant"


def test_needs_follow_the_advantage_and_the_ratio():
    needs = {name: objective_for(conf_of(f"loss={name}")).needs for name in LOSSES}
    assert needs["reinforce_pp"] == needs["reinforce_pp_baseline"] == {"step_statistics"}
    assert needs["gspo"] == needs["rloo"] == {"sequence_ratio"}
    assert needs["grpo"] == needs["max_rl"] == frozenset()
    other = objective_for(conf_of("loss=gspo", "advantage=whitened"))
    assert other.needs == {"sequence_ratio", "step_statistics"}


def test_a_step_is_whitened_over_its_loss_tokens():
    """Lengths are those of the outlines."""
    outlines = [
        Outline(7, 0, 3, 9, 1.0, "stop"), Outline(7, 1, 1, 9, 0.0, "stop"),
        Outline(9, 0, 2, 9, 0.0, "stop"), Outline(9, 1, 6, 9, 0.0, "stop"),
    ]  # fmt: skip
    objective = objective_of(LOSSES["reinforce_pp"], advantage_eps=0.0)
    advantages = advantages_of(Wave(outlines, []), objective, 2)
    deviation = math.sqrt((3 * 0.75**2 + 9 * 0.25**2) / 11)
    assert advantages[7] == pytest.approx([0.75 / deviation, -0.25 / deviation], rel=1e-6)
    assert advantages[9] == pytest.approx([-0.25 / deviation] * 2, rel=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_rollouts_without_tokens_make_no_difference_of_equal_ones(eps):
    """0.1 of three tokens: their mean is rounded, and their deviation is not to be divided by."""
    lengths_PG = torch.tensor([[1, 2], [1, 0]])
    rewards_PG = table([0.1, 0.1], [0.1, 9])
    for kind in ("whitened", "centred_whitened"):
        of_one_reward = rewards_PG if kind == "whitened" else table([0.1, 0.1], [3, 3])
        advantages_PG = group_advantages(of_one_reward, kind, eps, lengths_PG)
        assert advantages_PG.tolist() == [[0, 0], [0, 0]]
