"""Group advantages against numbers worked out by hand and a float64 loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rl.advantages import ROUNDING, equal_groups, group_advantages, made_equal, rewards_of
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


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e90])
def test_without_eps_advantages_have_a_deviation_of_one_at_any_size(size):
    rewards_PG = torch.tensor([[size, 0, 0, 0]], dtype=torch.float64)
    advantages_PG = group_advantages(rewards_PG, "std", eps=0)
    torch.testing.assert_close(advantages_PG, torch.tensor([[1.5, -0.5, -0.5, -0.5]]))
    equal_PG = torch.full((1, 4), size, dtype=torch.float64)
    assert group_advantages(equal_PG, "std", eps=0).tolist() == [[0.0] * 4]


@settings(deadline=None)
@given(REWARDS, st.sampled_from([1e-6, 1e-4, 0.5]))
def test_advantages_have_the_bits_of_the_formula(rewards, eps):
    """Rewards in float64, with exactly rounded sums."""
    for row in rewards:
        if max(row) - min(row) < 1e-9:
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
    ("low", "high"), [(16777216, 16777217), (2.0**39, 2.0**39 + 1), (0.0, 1e-11), (-1, -1 + 1e-11)]
)
def test_rewards_that_float64_tells_apart_are_no_equal_group(low, high):
    """float32 has the same number for both."""
    rewards_PG = rewards_of(wave_of(low, high), group_size=2)
    assert rewards_PG.tolist() == [[low, high]] and equal_groups(rewards_PG).tolist() == [False]
    half = (high - low) / 2
    assert (
        group_advantages(rewards_PG, "centred").tolist() == torch.tensor([[-half, half]]).tolist()
    )


SUM = 0.7 + 0.2 + 0.1  # 0.9999999999999999
EQUAL = {
    "a sum and its value": [1.0, SUM, 1.0, SUM],
    "seven and one": [SUM] + [1.0] * 7,
    "negative": [-SUM, -1.0],
    "two orders": [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1],
    "1000 terms": [sum([0.001] * 1000), 1.0],
    "cancelled": [0.1 + 0.2 - 0.3, 0.0],
    "around 0": [0.1 + 0.2 - 0.3, 0.3 - 0.2 - 0.1],
    "large": [1e20 * SUM, 1e20],
    "the edge": [1.0, 1.0 + ROUNDING / 2],
}


@pytest.mark.parametrize("name", EQUAL)
def test_rewards_that_differ_by_rounding_are_an_equal_group(name):
    """Its advantages are exactly 0, those of other groups stay, whatever the order."""
    row, mixed = EQUAL[name], [float(i) for i in range(len(EQUAL[name]))]
    assert min(row) < max(row)
    for order in (row, row[::-1]):
        rewards_PG = torch.tensor([order, mixed], dtype=torch.float64)
        assert equal_groups(rewards_PG).tolist() == [True, False]
        for kind in ("std", "centred"):
            for eps in (1e-6, 0.0):
                advantages_PG = group_advantages(rewards_PG, kind, eps)
                assert advantages_PG[0].tolist() == [0.0] * len(row)
                assert torch.equal(advantages_PG[1:], group_advantages(rewards_PG[1:], kind, eps))
        one_PG = made_equal(rewards_PG)
        assert torch.equal(one_PG[1], rewards_PG[1]) and len(set(one_PG[0].tolist())) == 1
        torch.testing.assert_close(one_PG[0], rewards_PG[0], rtol=ROUNDING, atol=ROUNDING)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.sampled_from([2, 3, 7, 8, 100, 1000]))
def test_the_mean_of_made_equal_rewards_is_exact_in_any_function(reward, group_size):
    """Against the rewards themselves: three times 0.1 does not average to 0.1."""
    rewards_PG = torch.full((1, group_size), reward, dtype=torch.float64)
    one_PG = made_equal(rewards_PG)
    total = 0.0
    for value in one_PG[0].tolist():
        total += value
    assert total / group_size == one_PG[0, 0]
    assert torch.equal(one_PG - one_PG.mean(1, keepdim=True), torch.zeros(1, group_size).double())
    assert one_PG.std(1).item() == 0


def test_whole_numbers_stay_as_they_are_where_they_are_made_equal():
    rewards_PG = torch.tensor([[16777217.0] * 3, [1e12 - 1] * 3, [0.75] * 3]).double()
    assert torch.equal(made_equal(rewards_PG), rewards_PG)


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
        (torch.zeros(1, 2), "median", "choose one of std, centred, leave_one_out, mean"),
        (torch.tensor([[1.0, -0.5]]), "mean", "rewards of 0 or more; shift the rewards"),
    ],
)
def test_bad_input_is_named(rewards_PG, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards_PG, kind)
