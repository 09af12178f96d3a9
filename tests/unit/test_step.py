"""From a wave to a rank's share of it: the same on every rank, nothing twice, nothing lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rl.advantages import group_advantages
from mesh.rl.cutting import owner
from mesh.rl.losses import Loss, clipped_surrogate
from mesh.rl.objective import Objective
from mesh.rl.packing import Leaf
from mesh.rl.statistics import rollout_metrics, score_metrics
from mesh.rl.step import (
    Minibatch,
    Share,
    StepSettings,
    advantages_of,
    credited,
    share_of,
    waves_of,
)
from mesh.tasks import numbered
from mesh.types import FINISH_REASONS, Outline, Prompt, Rollout, Wave, outline

STEP = StepSettings(num_prompts=3, group_size=2, waves=1, drop_equal_groups=False, pass_tokens=99)
DROPPING = replace(STEP, drop_equal_groups=True)
MASKING = replace(STEP, mask_truncated=True)
CENTRED = Objective(Loss(clipped_surrogate, "centred", "token"))


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
    mine = [r for r in rollouts if owner(r.prompt_id, num_ranks) == rank]
    return Wave([outline(r) for r in rollouts], mine)


def credited_share(
    wave: Wave, objective: Objective, step: StepSettings, num_ranks: int, rank: int | None
) -> Share:
    """A rank's share, cut and then credited."""
    share = share_of(wave, step, num_ranks, rank, step=7)
    return credited(share, advantages_of(wave, objective, step.group_size), objective)


def leaves_in(share: Share) -> list[Leaf]:
    return [leaf for one in share.passes for leaf in one]


# prompts 4, 5 and 6: rewards mixed, equal, mixed
GROUPS = [
    rollout(4, 0, 3, 1.0), rollout(4, 1, 1, 0.0),
    rollout(5, 0, 2, 1.0), rollout(5, 1, 2, 1.0),
    rollout(6, 0, 4, 0.0), rollout(6, 1, 5, 4.0, "length"),
]  # fmt: skip


def test_share_by_hand():
    share = credited_share(wave_of(GROUPS), CENTRED, STEP, 1, 0)
    mine = leaves_in(share)
    assert [leaf.prompt_id for leaf in mine] == [4, 5, 6]
    assert [leaf.advantages for leaf in mine] == [(0.5, -0.5), (0.0, 0.0), (-2.0, 2.0)]
    # prompts of 5, 6 and 7 tokens, twice each, and the responses
    assert [leaf.num_tokens for leaf in mine] == [10 + 4, 12 + 4, 14 + 9]
    assert (share.tokens, share.sequences) == (17, 6)
    assert share.rollouts == GROUPS


def test_a_share_is_cut_before_anything_is_known_of_advantages():
    """And has the same passes afterwards."""
    wave = wave_of(GROUPS)
    before, after = share_of(wave, STEP, 1, 0, step=7), credited_share(wave, CENTRED, STEP, 1, 0)
    assert {x for leaf in leaves_in(before) for x in (*leaf.advantages, *leaf.weights)} == {0.0}
    assert before.rollouts == after.rollouts == GROUPS
    assert (before.tokens, before.sequences) == (after.tokens, after.sequences)
    cuts = [[[leaf.rollouts for leaf in x] for x in share.passes] for share in (before, after)]
    assert cuts[0] == cuts[1]


def test_passes_are_full_and_as_many_on_every_rank():
    """Prompts of 14, 16 and 23 tokens: 4 and 6 are rank 0's, 5 is rank 1's."""
    for pass_tokens, cuts in ((37, [[4, 6]]), (36, [[4], [6]])):
        step = replace(STEP, pass_tokens=pass_tokens)
        shares = [credited_share(wave_of(GROUPS, r, 2), CENTRED, step, 2, r) for r in range(2)]
        found = [[[leaf.prompt_id for leaf in one] for one in share.passes] for share in shares]
        assert found == [cuts, [[5], []][: len(cuts)]]


def test_equal_groups_are_dropped_everywhere():
    share = credited_share(wave_of(GROUPS), CENTRED, DROPPING, 1, 0)
    assert [leaf.prompt_id for leaf in leaves_in(share)] == [4, 6]
    assert [leaf.num_tokens for leaf in leaves_in(share)] == [14, 23]
    assert (share.tokens, share.sequences) == (13, 4)


def test_a_masked_rollout_leaves_the_loss_and_its_divisor_but_not_its_group():
    """The last one, of 5 tokens and reward 4: sample 0 still has -2 and not 0."""
    share = credited_share(wave_of(GROUPS), CENTRED, MASKING, 1, 0)
    mine = leaves_in(share)
    assert [leaf.advantages for leaf in mine] == [(0.5, -0.5), (0.0, 0.0), (-2.0,)]
    assert [leaf.num_tokens for leaf in mine] == [10 + 4, 12 + 4, 7 + 4]
    assert (share.tokens, share.sequences) == (12, 5)
    assert share.rollouts == GROUPS[:-1]
    for aggregation, divisor in {"token": 12, "sequence": 5, "constant": 5 * 9}.items():
        objective = Objective(Loss(clipped_surrogate, "centred", aggregation), longest_response=9)
        assert objective.normaliser(share.tokens, share.sequences) == divisor


@pytest.mark.parametrize(
    ("finish", "masked"), [("stop", 0), ("length", 2), ("turns", 0), ("context", 2), ("tokens", 2)]
)
def test_what_was_cut_before_its_end_is_masked(finish, masked):
    group = [rollout(4, i, 2, float(i), finish) for i in range(2)]
    share = credited_share(wave_of(group), CENTRED, MASKING, 1, 0)
    assert share.sequences == len(share.rollouts) == 2 - masked
    assert rollout_metrics([wave_of(group)], 2)["response/truncated"] == masked / 2


def test_nothing_left_is_no_pass():
    """A group of equal rewards dropped, and one masked as a whole."""
    cut = [replace(r, finish_reason="length") for r in GROUPS[:2]]
    for rank in range(2):
        for group, keys in ((GROUPS[2:4], DROPPING), (cut, MASKING)):
            wave = wave_of(group, rank, 2)
            assert credited_share(wave, CENTRED, keys, 2, rank) == Share([Minibatch([], 0, 0)])


def test_off_the_trainer_nothing_is_due():
    assert credited_share(Wave([], []), CENTRED, STEP, 3, None) == Share([Minibatch([], 0, 0)])


def test_weights_follow_the_aggregation():
    sequence = Objective(Loss(clipped_surrogate, "centred", "sequence"))
    share = credited_share(wave_of(GROUPS), sequence, STEP, 1, 0)
    thirds = torch.tensor(1 / 3, dtype=torch.float32).item()
    assert leaves_in(share)[0].weights == (thirds, 1.0)


def test_a_lost_rollout_is_named():
    wave = wave_of(GROUPS)
    with pytest.raises(AssertionError, match=r"lost: \[\(5, 1\)\]"):
        credited_share(Wave(wave.outlines, [*GROUPS[:3], *GROUPS[4:]]), CENTRED, STEP, 1, 0)


def test_leaves_that_are_not_the_schedule_s_are_refused():
    """All ranks' passes are derived from the outlines: they must be those of the rollouts."""
    wave = wave_of(GROUPS)
    outlines = [replace(one, num_tokens=one.num_tokens + 1) for one in wave.outlines]
    with pytest.raises(AssertionError, match="leaves are not the schedule's"):
        credited_share(Wave(outlines, wave.rollouts), CENTRED, STEP, 1, 0)


@st.composite
def steps(draw):
    """Rollouts of P prompts, the objective, the step, and the number of trainer ranks."""
    group_size = draw(st.integers(2, 4))
    lengths = st.integers(0, 6)
    rewards = st.sampled_from([0.0, 0.5, 1.0])
    ends = st.sampled_from(FINISH_REASONS)
    rollouts = [
        rollout(prompt_id, sample_id, draw(lengths), draw(rewards), draw(ends))
        for prompt_id in range(draw(st.integers(1, 7)))
        for sample_id in range(group_size)
    ]
    loss = Loss(clipped_surrogate, draw(st.sampled_from(["std", "centred"])))
    keys = StepSettings(
        num_prompts=len(rollouts) // group_size,
        group_size=group_size,
        waves=1,
        drop_equal_groups=draw(st.booleans()),
        pass_tokens=draw(st.integers(1, 40)),
        mask_truncated=draw(st.booleans()),
    )
    return rollouts, Objective(loss), keys, draw(st.integers(1, 4))


@settings(deadline=None, max_examples=200)
@given(steps())
def test_ranks_agree_and_share_every_kept_rollout_once(step):
    rollouts, objective, keys, num_ranks = step
    shares = [
        credited_share(wave_of(rollouts, r, num_ranks), objective, keys, num_ranks, r)
        for r in range(num_ranks)
    ]
    rewards_PG = torch.tensor([r.reward for r in rollouts]).view(-1, keys.group_size)
    advantages_PG = group_advantages(rewards_PG, objective.loss.advantage)
    mixed = [len(set(row)) > 1 or not keys.drop_equal_groups for row in rewards_PG.tolist()]
    cut = ("length", "context", "tokens") if keys.mask_truncated else ()
    kept = [r for r in rollouts if mixed[r.prompt_id] and r.finish_reason not in cut]
    trained = {}
    assert len({len(share.passes) for share in shares}) == 1
    for rank, share in enumerate(shares):
        assert (share.tokens, share.sequences) == (sum(len(r.tokens) for r in kept), len(kept))
        filled = [[leaf.num_tokens for leaf in one] for one in share.passes]
        assert all(sum(one) <= keys.pass_tokens or len(one) == 1 for one in filled)
        for leaf in leaves_in(share):
            assert owner(leaf.prompt_id, num_ranks) == rank
            for r, advantage in zip(leaf.rollouts, leaf.advantages, strict=True):
                assert r.key not in trained
                trained[r.key] = r
                assert advantage == advantages_PG[r.prompt_id, r.sample_id].item()
    assert trained == {r.key: r for r in kept}


def test_waves_keep_every_prompt_in_order():
    prompts = numbered([Prompt(i, "a", "b") for i in range(12)])
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
        "response/truncated": pytest.approx(1 / 6),
        "truncated": pytest.approx(1 / 6),
    }
    assert rollout_metrics([Wave([], []), Wave([], [])], group_size=2) == {}


def test_parts_are_means_of_those_that_have_them_exactly_rounded_in_any_order():
    """0.1 + 0.2 + 0.3 is not 0.6 in floating point, and 1e17 would swallow the others."""
    values = [0.1, 0.2, 0.3, 1e17, 1.0, -1e17]
    scores = [
        (("all", value), ("some", 2.0)) if i < 2 else (("all", value),)
        for i, value in enumerate(values)
    ]
    verdicts = [True, None, False, True, None, None]
    outlines = [
        Outline(0, i, 1, 2, 0.0, "stop", parts, correct)
        for i, (parts, correct) in enumerate(zip(scores, verdicts, strict=True))
    ]
    for order in (outlines, outlines[::-1]):
        found = score_metrics(order)
        assert found == {"reward/all": 1.6 / 6, "reward/some": 2.0, "reward/correct": 2 / 3}
        assert (
            rollout_metrics([Wave(order[:2], []), Wave(order[2:], [])], 2).items() >= found.items()
        )
    assert score_metrics([Outline(0, 0, 1, 2, 0.0, "stop")]) == {}
