"""Packing: by hand once, then as properties over random groups, meshes and waves."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rl.aggregation import loss_sum, token_weights
from mesh.rl.cutting import assign, fill, owner, schedule
from mesh.rl.losses import LossTokens, clipped_surrogate
from mesh.rl.packing import assert_complete, leaves, pack
from mesh.types import Rollout


def _rollout(prompt_id, sample_id, prompt, tokens, logprobs=None):
    logprobs = tuple(logprobs or [-0.5 * (i + 1) for i in range(len(tokens))])
    return Rollout(prompt_id, sample_id, tuple(prompt), tuple(tokens), logprobs, 0.0, "stop")


def _leaves(rollouts, leaf_tokens=None):
    """Rollout r has advantage r + 1 and weight 10 * (r + 1)."""
    numbers_R = torch.arange(1.0, len(rollouts) + 1)
    return leaves(rollouts, numbers_R, 10 * numbers_R, leaf_tokens)


@st.composite
def steps(draw):
    """The rollouts of a step, shuffled; every response token is a number of its own."""
    num_prompts, group_size = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    rollouts, token = [], 1000
    for prompt_id in range(num_prompts):
        prompt = range(draw(st.integers(1, 5)))
        for sample_id in range(group_size):
            length = draw(st.integers(1, 6))
            rollouts.append(_rollout(prompt_id, sample_id, prompt, range(token, token + length)))
            token += length
    return draw(st.permutations(rollouts)), num_prompts, group_size


def _own_leaves(step_leaves, prompt_ids, num_ranks):
    """Every rank's leaves of those prompts, as the recipe would select them."""
    return [
        [leaf for leaf in step_leaves if leaf.prompt_id in own]
        for own in assign(prompt_ids, num_ranks)
    ]


def _batches(step_leaves, prompt_ids, num_ranks, max_tokens):
    """[rank][pass] packed batches."""
    by_rank = _own_leaves(step_leaves, prompt_ids, num_ranks)
    plan = schedule([[leaf.num_tokens for leaf in own] for own in by_rank], max_tokens)
    return [
        [pack([own[i] for i in indices]) for indices in part]
        for own, part in zip(by_rank, plan, strict=True)
    ]


def test_pack_by_hand():
    rollouts = [
        _rollout(7, 0, [1, 2, 3], [10, 11]),
        _rollout(7, 1, [1, 2, 3], [12]),
        _rollout(2, 0, [4], [13, 14, 15]),
    ]
    batch = pack(_leaves(rollouts))
    assert batch.tokens_T.tolist() == [4, 13, 14, 15, 1, 2, 3, 10, 11, 1, 2, 3, 12]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 9, 13]
    assert batch.max_seqlen == 5
    assert batch.index_A.tolist() == [0, 1, 2, 6, 7, 11]
    assert batch.targets_A.tolist() == [13, 14, 15, 10, 11, 12]
    assert batch.generator_logprobs_A.tolist() == [-0.5, -1.0, -1.5, -0.5, -1.0, -0.5]
    assert torch.equal(batch.old_logprobs_A, batch.generator_logprobs_A)
    assert batch.advantages_A.tolist() == [3, 3, 3, 1, 1, 2]
    assert batch.weights_A.tolist() == [30, 30, 30, 10, 10, 20]
    assert batch.sequence_A.tolist() == [0, 0, 0, 1, 1, 2]


def test_dtypes_with_and_without_tokens():
    """Shapes aside, an empty pass is like any other."""
    batch, empty = pack(_leaves([_rollout(0, 0, [1], [2])])), pack([])
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens_T.dtype == batch.index_A.dtype == batch.sequence_A.dtype == torch.int64
    assert batch.weights_A.dtype == batch.generator_logprobs_A.dtype == torch.float32
    for one, other in zip(batch.to("cpu").__dict__.values(), empty.__dict__.values(), strict=True):
        assert getattr(one, "dtype", int) == getattr(other, "dtype", int)


def test_an_empty_pass_is_one_token():
    empty = pack([])
    assert empty.tokens_T.shape == (1,)
    assert (empty.positions_T.tolist(), empty.cu_seqlens.tolist()) == ([0], [0, 1])
    assert empty.max_seqlen == 1
    assert all(getattr(empty, f.name).shape == (0,) for f in fields(empty) if "_A" in f.name)


def test_empty_response_has_no_targets():
    batch = pack(_leaves([_rollout(0, 0, [1, 2], []), _rollout(0, 1, [1, 2], [5])]))
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert (batch.index_A.tolist(), batch.sequence_A.tolist()) == ([3], [1])


def test_logprobs_keep_their_bits():
    """A float32 logprob that travelled as a Python float comes back as itself."""
    logprobs_A = torch.rand(100).log()
    rollout = _rollout(0, 0, [1], range(100), logprobs_A.tolist())
    assert torch.equal(pack(_leaves([rollout])).generator_logprobs_A, logprobs_A)


def test_leaf_cut_by_hand():
    """Rollouts of 5, 4, 4, 9 and 2 tokens; pieces of at most 8, the 9 by itself."""
    lengths = [4, 3, 3, 8, 1]
    rollouts = [_rollout(3, g, [1], range(n)) for g, n in enumerate(lengths)]
    pieces = _leaves(rollouts, leaf_tokens=8)
    assert [[r.sample_id for r in leaf.rollouts] for leaf in pieces] == [[0], [1, 2], [3], [4]]
    assert [(leaf.prompt_id, leaf.piece) for leaf in pieces] == [(3, 0), (3, 1), (3, 2), (3, 3)]
    assert [leaf.num_tokens for leaf in pieces] == [5, 8, 9, 2]
    assert pieces[1].advantages == (2.0, 3.0) and pieces[1].weights == (20.0, 30.0)
    assert len(_leaves(rollouts)) == 1


def test_assign_is_modulo():
    assert assign([5, 0, 3, 4, 1, 2, 6], 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert [owner(i, 2) for i in (0, 1, 2)] == [0, 1, 0]


def test_fill_by_hand():
    assert fill([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert fill([3, 1], 0) == [[0], [1]]
    assert fill([], 6) == []


def test_schedule_pads_to_the_longest():
    assert schedule([[3, 3, 3], [1], []], 6) == [[[0, 1], [2]], [[0], []], [[], []]]
    assert schedule([[], []], 6) == [[], []]


@given(
    st.lists(st.lists(st.integers(1, 20), max_size=12), min_size=1, max_size=4), st.integers(0, 40)
)
def test_schedule_properties(counts_by_rank, max_tokens):
    """Every leaf once and in order, equal numbers, within the limit, and greedily full."""
    plan = schedule(counts_by_rank, max_tokens)
    assert len({len(part) for part in plan}) == 1
    for counts, part in zip(counts_by_rank, plan, strict=True):
        assert [i for indices in part for i in indices] == list(range(len(counts)))
        filled = [[counts[i] for i in indices] for indices in part if indices]
        assert all(sum(c) <= max_tokens or len(c) == 1 for c in filled)
        pairs = zip(filled, filled[1:], strict=False)
        assert all(sum(one) + after[0] > max_tokens for one, after in pairs)


@settings(deadline=None)
@given(steps(), st.integers(1, 4), st.integers(0, 60), st.none() | st.integers(1, 30))
def test_every_token_exactly_once(step, num_ranks, max_tokens, leaf_tokens):
    """Each response token is the target of one hidden state: the one just before it."""
    rollouts, num_prompts, group_size = step
    step_leaves = _leaves(rollouts, leaf_tokens)
    batches_by_rank = _batches(step_leaves, range(num_prompts), num_ranks, max_tokens)
    assert len({len(part) for part in batches_by_rank}) == 1
    batches = [batch for part in batches_by_rank for batch in part]
    targets = [t for batch in batches for t in batch.targets_A.tolist()]
    assert sorted(targets) == sorted(t for r in rollouts for t in r.tokens)
    for batch in batches:
        assert torch.equal(batch.tokens_T[batch.index_A + 1], batch.targets_A)
        starts_A = batch.cu_seqlens[batch.sequence_A]
        assert torch.equal(batch.positions_T[batch.index_A], batch.index_A - starts_A)
        assert (batch.index_A + 1 < batch.cu_seqlens[batch.sequence_A + 1]).all()
    seen = [r.key for leaf in step_leaves for r in leaf.rollouts]
    assert_complete(seen, range(num_prompts), group_size)


def _plain_loss(rollouts, table, advantages_R, weights_R):
    """The step's loss sum, rollout by rollout."""
    total = 0.0
    for r, advantage, weight in zip(rollouts, advantages_R, weights_R, strict=True):
        old_A = torch.tensor(r.logprobs, dtype=torch.float64)
        mine_A = table[list(r.tokens)]
        advantages_A = advantage.double().expand_as(mine_A)
        sequence_A = torch.zeros(len(mine_A), dtype=torch.int64)
        loss_A, _ = clipped_surrogate(LossTokens(mine_A, old_A, advantages_A, sequence_A))
        total += weight.item() * loss_A.sum().item()
    return total


def _batch_loss(batch, table):
    old_A = batch.old_logprobs_A.double()
    advantages_A = batch.advantages_A.double()
    tokens = LossTokens(table[batch.targets_A], old_A, advantages_A, batch.sequence_A)
    loss_A, _ = clipped_surrogate(tokens)
    return loss_sum(loss_A, batch.weights_A).item()


@settings(deadline=None)
@given(
    steps(),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 60),
    st.sampled_from(["token", "sequence"]),
    st.none() | st.integers(1, 30),
)
def test_any_waves_and_ranks_give_the_same_loss(step, num_ranks, waves, limit, kind, leaf_tokens):
    rollouts, num_prompts, _ = step
    generator = torch.Generator().manual_seed(num_prompts)
    table = -torch.rand(2000, generator=generator, dtype=torch.float64)
    advantages_R = torch.randn(len(rollouts), generator=generator)
    weights_R = token_weights(torch.tensor([r.length for r in rollouts]), kind)
    step_leaves = leaves(rollouts, advantages_R, weights_R, leaf_tokens)
    total = sum(
        _batch_loss(batch, table)
        for wave in range(waves)
        for part in _batches(step_leaves, range(wave, num_prompts, waves), num_ranks, limit)
        for batch in part
    )
    expected = _plain_loss(rollouts, table, advantages_R, weights_R)
    assert total == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(steps(), st.randoms(), st.none() | st.integers(1, 30))
def test_leaves_do_not_depend_on_arrival(step, random, leaf_tokens):
    """Nor on which other prompts are there."""
    rollouts, _, _ = step
    numbers = {(r.prompt_id, r.sample_id): float(i) for i, r in enumerate(rollouts)}

    def ordered(members):
        values_R = torch.tensor([numbers[r.prompt_id, r.sample_id] for r in members])
        return leaves(members, values_R, values_R, leaf_tokens)

    expected = ordered(rollouts)
    assert ordered(random.sample(rollouts, len(rollouts))) == expected
    alone = ordered([r for r in rollouts if r.prompt_id == 0])
    assert alone == [leaf for leaf in expected if leaf.prompt_id == 0]


def test_empty_prompt_is_named():
    with pytest.raises(ValueError, match="prompt_id=4 sample_id=1: the prompt is empty"):
        _leaves([_rollout(4, 0, [1], [2]), _rollout(4, 1, [], [2])])


def test_missing_logprobs_are_named():
    with pytest.raises(ValueError, match="prompt_id=4 sample_id=0: 1 logprobs for 2 tokens"):
        _leaves([_rollout(4, 0, [1], [2, 3], [-1.0])])


@pytest.mark.parametrize("leaf_tokens", [None, 1])
def test_repeated_rollout_is_refused(leaf_tokens):
    with pytest.raises(AssertionError, match=r"twice: \[\(4, 0\)\]"):
        _leaves([_rollout(4, 0, [1], [2]), _rollout(4, 0, [1], [3])], leaf_tokens)


def test_completeness_names_the_wrong_ones():
    whole = [(p, g) for p in (3, 5) for g in (0, 1)]
    assert_complete(reversed(whole), [5, 3], 2)
    with pytest.raises(AssertionError, match=r"lost: \[\(5, 1\)\]"):
        assert_complete(whole[:-1], [3, 5], 2)
    with pytest.raises(AssertionError, match=r"trained on twice: \[\(3, 0\)\]"):
        assert_complete([*whole, (3, 0)], [3, 5], 2)
    with pytest.raises(AssertionError, match=r"not of this step: \[\(4, 0\)\]"):
        assert_complete([*whole, (4, 0)], [3, 5], 2)
