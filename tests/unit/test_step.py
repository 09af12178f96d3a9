"""From a wave to a rank's share of it: the same on every rank, nothing twice, nothing lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rl.advantages import group_advantages
from mesh.rl.packing import owner
from mesh.rl.step import Rules, rollout_metrics, samples_of, share_of, waves_of
from mesh.types import Outline, Prompt, Rollout, Wave

RULES = Rules(
    group_size=2, advantage="centred", aggregation="token", drop_equal_groups=False, leaf_tokens=99
)


def rollout(prompt_id: int, sample_id: int, length: int, reward: float, finish: Any = "stop"):
    return Rollout(
        prompt_id,
        sample_id,
        (5,) * (prompt_id + 1),
        (6,) * length,
        (-1.0,) * length,
        reward,
        finish,
    )


def wave_of(rollouts: list[Rollout], rank: int = 0, num_ranks: int = 1) -> Wave:
    """What the trainer's data-parallel rank sees of them."""
    outlines = [
        Outline(r.prompt_id, r.sample_id, len(r.prompt_tokens), len(r.tokens), r.reward,
                r.finish_reason)
        for r in rollouts
    ]  # fmt: skip
    return Wave(outlines, [r for r in rollouts if owner(r.prompt_id, num_ranks) == rank])


# prompts 4, 5 and 6: rewards mixed, equal, mixed
GROUPS = [
    rollout(4, 0, 3, 1.0), rollout(4, 1, 1, 0.0),
    rollout(5, 0, 2, 1.0), rollout(5, 1, 2, 1.0),
    rollout(6, 0, 4, 0.0), rollout(6, 1, 5, 4.0, "length"),
]  # fmt: skip


def test_share_by_hand():
    share = share_of(wave_of(GROUPS), RULES, num_ranks=1)
    assert [leaf.prompt_id for leaf in share.leaves] == [4, 5, 6]
    assert [leaf.advantages for leaf in share.leaves] == [(0.5, -0.5), (0.0, 0.0), (-2.0, 2.0)]
    # prompts of 5, 6 and 7 tokens, twice each, and the responses
    assert share.token_counts == [[10 + 4, 12 + 4, 14 + 9]]
    assert (share.tokens, share.sequences) == (17, 6)


def test_equal_groups_are_dropped_everywhere():
    share = share_of(wave_of(GROUPS), replace(RULES, drop_equal_groups=True), num_ranks=1)
    assert [leaf.prompt_id for leaf in share.leaves] == [4, 6]
    assert share.token_counts == [[14, 23]]
    assert (share.tokens, share.sequences) == (13, 4)


def test_nothing_left_is_no_leaf():
    rules = replace(RULES, drop_equal_groups=True)
    share = share_of(wave_of(GROUPS[2:4]), rules, num_ranks=2)
    assert share == type(share)([], [[], []], 0, 0)


def test_off_the_trainer_nothing_is_due():
    share = share_of(Wave([], []), RULES, num_ranks=3)
    assert share == type(share)([], [[], [], []], 0, 0)


def test_weights_follow_the_aggregation():
    share = share_of(wave_of(GROUPS), replace(RULES, aggregation="sequence"), num_ranks=1)
    thirds = torch.tensor(1 / 3, dtype=torch.float32).item()
    assert share.leaves[0].weights == (thirds, 1.0)


def test_a_lost_rollout_is_named():
    wave = wave_of(GROUPS)
    with pytest.raises(AssertionError, match=r"lost: \[\(5, 1\)\]"):
        share_of(Wave(wave.outlines, [*GROUPS[:3], *GROUPS[4:]]), RULES, num_ranks=1)


@st.composite
def steps(draw):
    """Rollouts of P prompts, the rules, and the number of trainer ranks."""
    group_size = draw(st.integers(2, 4))
    lengths = st.integers(0, 6)
    rewards = st.sampled_from([0.0, 0.5, 1.0])
    rollouts = [
        rollout(prompt_id, sample_id, draw(lengths), draw(rewards))
        for prompt_id in range(draw(st.integers(1, 7)))
        for sample_id in range(group_size)
    ]
    advantage = draw(st.sampled_from(["std", "centred"]))
    rules = Rules(group_size, advantage, "token", draw(st.booleans()), draw(st.integers(1, 40)))
    return rollouts, rules, draw(st.integers(1, 4))


@settings(deadline=None, max_examples=200)
@given(steps())
def test_ranks_agree_and_share_every_kept_rollout_once(step):
    rollouts, rules, num_ranks = step
    shares = [share_of(wave_of(rollouts, r, num_ranks), rules, num_ranks) for r in range(num_ranks)]
    counts = [[leaf.num_tokens for leaf in share.leaves] for share in shares]
    rewards_PG = torch.tensor([r.reward for r in rollouts]).view(-1, rules.group_size)
    advantages_PG = group_advantages(rewards_PG, rules.advantage)
    mixed = [len(set(row)) > 1 or not rules.drop_equal_groups for row in rewards_PG.tolist()]
    kept = [r for r in rollouts if mixed[r.prompt_id]]
    trained = {}
    for rank, share in enumerate(shares):
        assert share.token_counts == counts
        assert (share.tokens, share.sequences) == (sum(len(r.tokens) for r in kept), len(kept))
        for leaf in share.leaves:
            assert owner(leaf.prompt_id, num_ranks) == rank
            for r, advantage in zip(leaf.rollouts, leaf.advantages, strict=True):
                assert (r.prompt_id, r.sample_id) not in trained
                trained[r.prompt_id, r.sample_id] = r
                assert advantage == advantages_PG[r.prompt_id, r.sample_id].item()
    assert trained == {(r.prompt_id, r.sample_id): r for r in kept}


def test_waves_keep_every_prompt_in_order():
    prompts = [Prompt(i, "a", "b") for i in range(12)]
    waves = waves_of(prompts, 3)
    assert [len(wave) for wave in waves] == [4, 4, 4]
    assert [prompt for wave in waves for prompt in wave] == prompts
    with pytest.raises(AssertionError, match="do not divide"):
        waves_of(prompts, 5)


def test_rollout_metrics_by_hand_over_two_waves():
    metrics = rollout_metrics([wave_of(GROUPS[:4]), wave_of(GROUPS[4:])], group_size=2)
    rewards = torch.tensor([1.0, 0, 1, 1, 0, 4]).double()
    assert metrics == {
        "reward/mean": pytest.approx(7 / 6),
        "reward/std": pytest.approx(rewards.std().item()),
        "equal_groups": pytest.approx(1 / 3),
        "tokens/generated": 17,
        "response_length/mean": pytest.approx(17 / 6),
        "response_length/max": 5,
        "truncated": pytest.approx(1 / 6),
    }
    assert rollout_metrics([Wave([], []), Wave([], [])], group_size=2) == {}


def test_samples_carry_the_advantages_of_whole_groups():
    """On a rank that owns prompt 5 and one that owns the others; a wave that a rank got nothing of
    gives nothing."""
    prompts = [Prompt(i, f"{i}>", f"a{i}") for i in (4, 5, 6)]
    waves = [wave_of(GROUPS, rank=0, num_ranks=2), wave_of([], rank=0), Wave([], [])]
    rules = replace(RULES, drop_equal_groups=True)
    samples = samples_of(prompts, waves, rules, lambda tokens: "x" * len(tokens))
    found = [(s["prompt_id"], s["sample_id"], s["advantage"]) for s in samples]
    assert found == [(4, 0, 0.5), (4, 1, -0.5), (6, 0, -2.0), (6, 1, 2.0)]
    assert samples[3] == {
        "prompt_id": 6, "sample_id": 1, "prompt": "6>", "response": "xxxxx", "answer": "a6",
        "reward": 4.0, "advantage": 2.0, "finish_reason": "length",
    }  # fmt: skip
    (equal, _) = samples_of(prompts, [wave_of(GROUPS, 1, 2)], rules, str)
    assert (equal["prompt_id"], equal["advantage"]) == (5, 0.0)
