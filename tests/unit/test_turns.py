"""Rollouts with turns of an environment: only sampled tokens carry loss, and are counted.

A rollout without turns is their special case, of one turn that was sampled.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from small_trainer import (
    CPU,
    accumulate,
    conf_of,
    leaves_of,
    num_tokens,
    objective_for,
    passes_in,
    some_rollouts,
    trainer_of,
)

from mesh.exactness.comparison import Tally, by_key, compare_rollouts
from mesh.exactness.strict import message, report, to_json
from mesh.exactness.trace import trace_training
from mesh.exactness.trainer import scored
from mesh.exactness.verdict import Verdict
from mesh.exchange.rollouts import _outlines, _parts, _payload, _table, _unpack
from mesh.layout.holdings import local_tensors
from mesh.model.attention import packed_context
from mesh.model.families import TINY
from mesh.model.parallel import local
from mesh.model.policy import build_policy, named_weights
from mesh.rl.losses import Loss, clipped_surrogate
from mesh.rl.objective import Objective
from mesh.rl.packing import PackedBatch, leaves, pack
from mesh.rl.statistics import rollout_metrics
from mesh.rl.step import StepSettings, advantages_of, credited, share_of
from mesh.roles.gradients import summed_gradients
from mesh.roles.nonfinite import BadSequence, Trained, bad_sequences
from mesh.types import FINISH_REASONS, Rollout, Turn, Wave, outline

# two tokens are sampled, three written by the environment, one is sampled
TURNS = (Turn(2, True), Turn(3, False), Turn(1, True))
PLAIN = Rollout(4, 0, (7, 8, 9), (50, 51), (-1.0, -2.0), 1.0, "stop")
TURNED = Rollout(4, 1, (1, 2), (10, 11, 20, 21, 22, 12), (-0.5, -0.25, -4.0), 0.0, "turns", TURNS)


def packed(*rollouts: Rollout) -> PackedBatch:
    """Rollout r has advantage r + 1, and its tokens the weight 10 * (r + 1)."""
    numbers_R = torch.arange(1.0, len(rollouts) + 1)
    return pack(leaves(rollouts, numbers_R, 10 * numbers_R))


def one_turn(rollout: Rollout) -> Rollout:
    """The same with its one turn written down."""
    return replace(rollout, turns=(Turn(len(rollout.tokens), sampled=True),))


def test_mask_indices_and_length_by_hand():
    assert TURNED.loss_mask == (True, True, False, False, False, True)
    assert TURNED.loss_indices == (0, 1, 5)
    assert (TURNED.length, TURNED.num_tokens, TURNED.key) == (3, 8, (4, 1))
    assert (PLAIN.loss_mask, PLAIN.loss_indices) == ((True, True), (0, 1))
    assert (PLAIN.length, PLAIN.num_tokens) == (2, 5)
    only = replace(TURNED, turns=(Turn(6, False),), logprobs=())
    assert (only.loss_mask, only.loss_indices, only.length) == ((False,) * 6, (), 0)
    for rollout in (PLAIN, TURNED, only):
        one = outline(rollout)
        assert (one.key, one.length, one.num_tokens) == (
            rollout.key,
            rollout.length,
            rollout.num_tokens,
        )
        assert (one.reward, one.finish_reason) == (rollout.reward, rollout.finish_reason)


def test_pack_by_hand():
    """Environment tokens are inputs of the model and no more."""
    batch = packed(PLAIN, TURNED)
    assert batch.tokens_T.tolist() == [7, 8, 9, 50, 51, 1, 2, 10, 11, 20, 21, 22, 12]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 5, 13]
    assert batch.index_A.tolist() == [2, 3, 6, 7, 11]
    assert batch.targets_A.tolist() == [50, 51, 10, 11, 12]
    assert batch.generator_logprobs_A.tolist() == [-1.0, -2.0, -0.5, -0.25, -4.0]
    assert torch.equal(batch.old_logprobs_A, batch.generator_logprobs_A)
    assert batch.advantages_A.tolist() == [1, 1, 2, 2, 2]
    assert batch.weights_A.tolist() == [10, 10, 20, 20, 20]
    assert batch.sequence_A.tolist() == [0, 0, 1, 1, 1]


def test_one_sampled_turn_packs_as_none():
    rollouts = some_rollouts()
    without, with_turns = (pack(leaves_of(x)) for x in (rollouts, list(map(one_turn, rollouts))))
    for field in fields(PackedBatch):
        one, other = getattr(without, field.name), getattr(with_turns, field.name)
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, field.name


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"turns": TURNS[:2]}, "turns of 5 tokens, but 6 tokens; let the turns cover all"),
        ({"turns": (*TURNS, Turn(1, False))}, "turns of 7 tokens, but 6 tokens"),
        ({"logprobs": (-1.0,) * 6}, "6 logprobs for 3 tokens; give one for each"),
    ],
)
def test_turns_and_logprobs_that_do_not_fit_the_tokens_are_named(changes, wrong):
    with pytest.raises(ValueError, match=f"prompt_id=4 sample_id=1: {wrong}"):
        packed(replace(TURNED, **changes))


def test_a_step_weighs_and_counts_loss_tokens():
    """A rollout weighs 1 / loss tokens; a pass has room for all tokens."""
    wave = Wave([outline(PLAIN), outline(TURNED)], [PLAIN, TURNED])
    step = StepSettings(1, 2, waves=1, drop_equal_groups=False, pass_tokens=13)
    objective = Objective(Loss(clipped_surrogate, "centred", "sequence"))
    share = share_of(wave, step, 1, 0, step=0)
    assert [leaf.weights for one in share.passes for leaf in one] == [(0.0, 0.0)], "not yet known"
    share = credited(share, advantages_of(wave, objective, 2), objective)
    ((leaf,),) = share.passes
    assert leaf.num_tokens == 13
    assert leaf.weights == (0.5, torch.tensor(1 / 3).item())
    assert (share.tokens, share.sequences) == (5, 2)
    smaller = replace(step, pass_tokens=12)
    assert len(share_of(wave, smaller, 1, 0, step=0).passes) == 2


def test_statistics_count_loss_tokens_and_every_end_but_a_stop_is_truncated():
    reasons = [replace(TURNED, sample_id=i, finish_reason=r) for i, r in enumerate(FINISH_REASONS)]
    assert FINISH_REASONS == ("stop", "length", "turns", "context", "tokens")
    wave = Wave([outline(r) for r in [replace(PLAIN, sample_id=9), *reasons]], [])
    metrics = rollout_metrics([wave], group_size=6)
    assert metrics["response_length/mean"] == (2 + 5 * 3) / 6
    assert metrics["response_length/max"] == 3
    assert metrics["tokens/generated"] == 2 + 5 * 3
    assert metrics["truncated"] == 4 / 6
    assert metrics["response/truncated"] == 3 / 6, "the most turns are an end that was planned"


@pytest.mark.parametrize("reason", FINISH_REASONS)
def test_the_exchange_carries_turns_and_every_finish_reason(reason):
    sent = [PLAIN, replace(TURNED, finish_reason=reason), one_turn(replace(PLAIN, sample_id=2))]
    table = _table(sent)
    outlines = _outlines(table, _parts(sent))
    assert outlines == [outline(r) for r in sent]
    owned = list(zip(outlines, table.tolist(), strict=True))
    assert _unpack(owned, *_payload(sent)) == sent


def compared(logprobs: tuple[float, ...]) -> Tally:
    """Both rollouts, the second with these trainer logprobs."""
    logprobs_A = torch.tensor([*PLAIN.logprobs, *logprobs])
    mine = scored([PLAIN, TURNED], logprobs_A)
    assert mine[TURNED.key].logprobs == logprobs and mine[PLAIN.key] == PLAIN
    return compare_rollouts(mine, by_key([PLAIN, TURNED]))


def test_a_comparison_is_of_a_loss_token_and_knows_its_places():
    assert compared(TURNED.logprobs) == Tally(5)
    tally = compared((-0.5, -0.25, -3.0))
    assert (tally.compared, tally.different) == (5, 1) and tally.first is not None
    first = tally.first
    assert (first.key, first.index, first.position, first.token) == ((4, 1), 5, 7, 12)
    assert first.logprobs == (-3.0, -4.0)
    verdict = Verdict("the verdict")
    said = message(3, tally, verdict)
    assert "token: 12, at position 5 of the response and 7 of the sequence" in said
    facts = json.loads(to_json(report(3, tally, verdict)))["first"]
    assert [facts[name] for name in ("index", "position", "token")] == [5, 7, 12]


def test_a_sampled_token_that_differs_is_found_with_equal_logprobs():
    other = replace(TURNED, tokens=(*TURNED.tokens[:5], 13))
    tally = compare_rollouts(by_key([other]), by_key([TURNED]))
    assert (tally.compared, tally.different) == (3, 1) and tally.first is not None
    assert (tally.first.position, tally.first.token) == (7, 13)
    assert [value.partition(" ")[0] for value in tally.first.values] == ["13", "12"]


def test_a_side_that_has_more_sampled_tokens_differs_where_the_other_ends():
    shorter = replace(
        TURNED, tokens=TURNED.tokens[:5], turns=TURNS[:2], logprobs=TURNED.logprobs[:2]
    )
    tally = compare_rollouts(by_key([shorter]), by_key([TURNED]))
    assert (tally.compared, tally.different) == (3, 1) and tally.first is not None
    assert (tally.first.index, tally.first.position, tally.first.token) == (5, 7, 12)
    assert tally.first.values[0] == "the end" and tally.first.logprobs == (None, -4.0)


def test_what_is_not_finite_is_found_at_its_place_in_the_response():
    values_A = torch.tensor([*PLAIN.logprobs, -0.5, -0.25, torch.nan])
    trained = Trained((PLAIN, TURNED), values_A, torch.zeros(5), None)
    assert bad_sequences([trained]) == [BadSequence(4, 1, 5, "trainer logprob", "nan", 1, 3)]


def model_rollouts() -> list[Rollout]:
    """Two of the small trainer's, the first with the environment's two tokens in its middle. Packed
    they are in the other order: that one is of prompt 1.
    """
    other, _, turned, _ = some_rollouts()
    turns = (Turn(1, True), Turn(2, False), Turn(1, True))
    return [replace(turned, turns=turns, logprobs=turned.logprobs[:2]), other]


def test_the_gradient_is_that_of_the_sampled_tokens_alone(solo_mesh):
    """Against plain autograd on a model of the same weights, sequence by sequence."""
    conf = conf_of()
    trainer, rollouts = trainer_of(conf), model_rollouts()
    weights, advantages, moves = (0.5, 0.5), (1.0, -0.5), 0
    plain = build_policy(TINY, 64, CPU, torch.float32, solo_mesh)
    with torch.no_grad():
        for name, weight in named_weights(plain).items():
            weight.copy_(local(trainer.weights()[name]))
    for rollout, weight, advantage in zip(rollouts, weights, advantages, strict=True):
        tokens_T = torch.tensor([*rollout.prompt_tokens, *rollout.tokens])
        length = len(tokens_T)
        context = packed_context(torch.tensor([0, length], dtype=torch.int32), length)
        hidden_TD = plain.hidden(tokens_T, torch.arange(length), context)
        logits_TV = hidden_TD @ local(plain.lm_head.weight).t()
        for number, index in enumerate([0, 1, 2] if not rollout.turns else [0, 3]):
            place = len(rollout.prompt_tokens) + index
            logprob = logits_TV[place - 1].log_softmax(-1)[tokens_T[place]]
            ratio = (logprob - rollout.logprobs[number]).exp()
            bounded = ratio.clamp(0.8, 1.2)
            loss = -torch.minimum(ratio * advantage, bounded * advantage)
            (weight * loss).backward(retain_graph=True)
            moves += bool(advantage > 0 and ratio < 1.2 and rollout.turns)
    assert moves == 2, "neither token of the turns is clipped"
    share = leaves_of(rollouts)
    accumulate(trainer, passes_in(share), objective_for(conf))
    mine = summed_gradients(trainer.model)
    theirs = {name: p.grad for name, p in plain.named_parameters()}
    assert len(theirs) == len(mine) > 20
    for (name, got), expected in zip(mine.items(), local_tensors(theirs).values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6, msg=name)
    assert trainer.update(2.0, num_tokens(share))["tokens/trained"] == 5


def test_one_sampled_turn_trains_with_the_same_bits_as_none(solo_mesh):
    conf, found = conf_of(), []
    for rollouts in (some_rollouts(), list(map(one_turn, some_rollouts()))):
        trainer, share = trainer_of(conf), leaves_of(rollouts)
        scores = accumulate(trainer, passes_in(share), objective_for(conf))
        found.append((scores.logprobs_A.tolist(), trainer.update(2.0, num_tokens(share))))
    assert found[0] == found[1]


def test_a_trace_has_the_logprobs_of_sampled_tokens_where_they_were_predicted(solo_mesh):
    """Of the rollout with turns, and of one that is packed after it."""
    turned, before = model_rollouts()
    after = some_rollouts()[3]
    share = leaves_of([before, turned, after])
    trainer = trainer_of(conf_of())
    scores = accumulate(trainer, passes_in(share), objective_for(conf_of()))
    parts = scores.logprobs_A.split([before.length, 2, after.length])
    for rollout, expected_A, indices in ((turned, parts[1], (0, 3)), (after, parts[2], range(5))):
        trace = trace_training(trainer, passes_in(share), rollout.key)
        start = len(rollout.prompt_tokens) - 1
        assert trace.positions["lm_head"] == [start + i for i in indices]
        assert trace.positions["norm"] == list(range(rollout.num_tokens))
        torch.testing.assert_close(trace.outputs["lm_head"][:, 0], expected_A)
