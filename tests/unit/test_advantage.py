"""Group advantages against numbers worked out by hand and a float64 loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rl.advantages import equal_groups, group_advantages, rewards_of
from mesh.types import Outline, Wave

REWARDS = st.lists(
    st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=1, max_size=6
)


def test_std_by_hand():
    """Mean 3/8, squared deviations 3 * 25/64 + 5 * 9/64 = 15/8, sample variance 15/56."""
    rewards_PG = torch.tensor([[1.0, 0, 0, 1, 0, 0, 1, 0]])
    deviation = math.sqrt(15 / 56) + 1e-6
    expected_PG = torch.tensor([[0.625 if r else -0.375 for r in rewards_PG[0].tolist()]]).double()
    advantages_PG = group_advantages(rewards_PG, "std")
    assert advantages_PG.dtype == torch.float32
    assert torch.equal(advantages_PG, (expected_PG / deviation).float())


def test_eps_is_added_to_the_deviation():
    """Rewards 0 and 2: deviations -1 and 1, sample deviation sqrt(2)."""
    advantages_PG = group_advantages(torch.tensor([[0.0, 2.0]]), "std", eps=1.0)
    expected = 1 / (math.sqrt(2) + 1)
    torch.testing.assert_close(advantages_PG, torch.tensor([[-expected, expected]]))


@pytest.mark.parametrize(("eps", "theirs"), [(1e-4, "TRL"), (1e-6, "verl")])
def test_the_advantages_are_those_of_other_systems_with_their_eps(eps, theirs):
    """(r - mean) / (r.std() + eps), written out: TRL's GRPOTrainer, verl's outcome advantage. The
    deviation of the second group is 1e-4 * sqrt(2/7): there the eps counts."""
    rewards_PG = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0], [1e-4, 0, 0, 0, 1e-4, 0, 0, 0]]).double()
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    expected_PG = (centred_PG / (rewards_PG.std(1, keepdim=True) + eps)).float()
    found_PG = group_advantages(rewards_PG, "std", eps)
    torch.testing.assert_close(found_PG, expected_PG, rtol=2e-7, atol=0)
    other_PG = group_advantages(rewards_PG, "std", 1.01e-4 - eps)
    ratios_P = (other_PG / found_PG)[:, 0].tolist()
    assert abs(ratios_P[0] - 1) < 3e-4 and abs(ratios_P[1] - 1) > 0.5


@pytest.mark.parametrize("size", [1.0, 1e-200, 1e-300, 1e90])
def test_without_eps_advantages_have_a_deviation_of_one_at_any_size(size):
    """Squares of 1e-200 are 0 in float64."""
    rewards_PG = torch.tensor([[size, 0, 0, 0]], dtype=torch.float64)
    advantages_PG = group_advantages(rewards_PG, "std", eps=0)
    torch.testing.assert_close(advantages_PG, torch.tensor([[1.5, -0.5, -0.5, -0.5]]))
    smallest_PG = torch.tensor([[5e-324, 0, 0, 0]], dtype=torch.float64)
    assert group_advantages(smallest_PG, "std", eps=0)[0, 0] > 0
    equal_PG = torch.full((1, 4), size, dtype=torch.float64)
    assert group_advantages(equal_PG, "std", eps=0).tolist() == [[0.0] * 4]


@settings(deadline=None)
@given(REWARDS, st.sampled_from([1e-6, 1e-4, 0.5]))
def test_scaling_by_a_power_of_two_changes_no_bit(rewards, eps):
    """Against the plain formula."""
    for row in rewards:
        if min(row) == max(row):
            continue
        centred = [x - math.fsum(row) / 4 for x in row]
        deviation = math.sqrt(math.fsum(x * x for x in centred) / 3)
        expected_G = torch.tensor([x / (deviation + eps) for x in centred]).float()
        assert torch.equal(group_advantages(torch.tensor([row]), "std", eps)[0], expected_G)


def test_centred_by_hand():
    advantages_PG = group_advantages(torch.tensor([[1.0, 0, 0, 1], [0.0, 0, 0, 2]]), "centred")
    assert advantages_PG.tolist() == [[0.5, -0.5, -0.5, 0.5], [-0.5, -0.5, -0.5, 1.5]]


@pytest.mark.parametrize("kind", ["std", "centred"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e7 + 0.1])
def test_equal_rewards_give_exactly_zero(kind, reward):
    """Three times 0.1 does not average to 0.1 in float64."""
    rewards_PG = torch.full((2, 3), reward, dtype=torch.float64)
    assert group_advantages(rewards_PG, kind).tolist() == [[0.0] * 3] * 2
    assert equal_groups(rewards_PG).tolist() == [True, True]


def test_equal_groups_names_only_those():
    rewards_PG = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]])
    assert equal_groups(rewards_PG).tolist() == [True, True, False, False]


def wave_of(*rewards: float) -> Wave:
    return Wave([Outline(0, i, 1, 2, reward, "stop") for i, reward in enumerate(rewards)], [])


@pytest.mark.parametrize(
    ("low", "high"), [(16777216, 16777217), (2.0**60, 2.0**60 + 512), (-1e-300, 0.0)]
)
def test_rewards_that_float64_tells_apart_are_no_equal_group(low, high):
    """float32 has the same number for both."""
    rewards_PG = rewards_of(wave_of(low, high), group_size=2)
    assert rewards_PG.tolist() == [[low, high]] and equal_groups(rewards_PG).tolist() == [False]
    half = (high - low) / 2
    assert (
        group_advantages(rewards_PG, "centred").tolist() == torch.tensor([[-half, half]]).tolist()
    )


def test_a_reward_beyond_float32_has_its_advantage():
    """Mean 5e38 and sample deviation sqrt(0.5) 1e39: the advantages are those of 0 and 1."""
    rewards_PG = rewards_of(wave_of(0.0, 1e39), group_size=2)
    half = math.sqrt(0.5)
    torch.testing.assert_close(group_advantages(rewards_PG, "std"), torch.tensor([[-half, half]]))


@pytest.mark.parametrize(
    ("high", "kind", "message"),
    [
        (1e39, "centred", r"rewards \[0.0, 1e\+39\] of one group: the advantage -5e\+38 is beyond"),
        (1e308, "std", r"rewards \[0.0, 1e\+308\] of one group: beyond 1e\+100 their statistics"),
    ],
)
def test_an_advantage_that_cannot_be_computed_names_the_rewards(high, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards_of(wave_of(0.0, high), group_size=2), kind)


@settings(deadline=None)
@given(REWARDS, st.sampled_from(["std", "centred"]), st.permutations(range(4)))
def test_bits_follow_the_own_group_only(rewards, kind, order):
    """Alone, among others, or with its rollouts in another order: the same bits."""
    rewards_PG = torch.tensor(rewards)
    advantages_PG = group_advantages(rewards_PG, kind)
    alone_PG = torch.cat([group_advantages(row_G[None], kind) for row_G in rewards_PG])
    assert torch.equal(advantages_PG, alone_PG)
    assert torch.equal(group_advantages(rewards_PG[:, order], kind), advantages_PG[:, order])


def test_sums_are_exactly_rounded():
    """The mean is 1/2 in any order; running sums lose a 1 beside 1e17, here or when permuted."""
    rewards_PG = torch.tensor([[1e17, 1, 1, -1e17], [1, 1e17, -1e17, 1]], dtype=torch.float64)
    rewards_PG = torch.cat([rewards_PG, rewards_PG[:, [1, 0, 3, 2]]])
    small_PG = group_advantages(rewards_PG, "centred")[rewards_PG == 1]
    assert small_PG.tolist() == [0.5] * 8


@settings(deadline=None)
@given(REWARDS)
def test_std_is_torchs_in_float64(rewards):
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    expected_PG = centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-6)
    advantages_PG = group_advantages(rewards_PG, "std").double()
    torch.testing.assert_close(advantages_PG, expected_PG, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("rewards_PG", "kind", "message"),
    [
        (torch.zeros(3, 1), "std", "group_size G of 2"),
        (torch.zeros(4), "std", "group_size G of 2"),
        (torch.tensor([[0.0, float("nan")]]), "std", "finite"),
        (torch.tensor([[0.0, float("inf")]]), "centred", "finite"),
        (torch.zeros(1, 2), "mean", "'std' or 'centred'"),
    ],
)
def test_bad_input_is_named(rewards_PG, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards_PG, kind)
