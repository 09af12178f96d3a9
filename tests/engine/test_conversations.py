"""Conversations on every engine: the bits of the full forward pass, whatever was kept of a turn.

With the switch on, logprobs of all turns are the same to the bit whether keys and values were kept,
taken by others, recomputed or chunked, and on vLLM with our model they are the native engine's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_engines import GREEDY, MAX_LENGTH, SAMPLED, policy, requests
from tiny_qwen3 import packed

from mesh.engine.base import Continuation
from mesh.engine.conversation import Scripted, converse, script_of
from mesh.engine.vllm.checks import install_problems
from mesh.exactness.trace import first_difference, trace_generation
from mesh.invariant.switch import batch_invariant
from mesh.types import Completion

pytestmark = pytest.mark.timeout(600)  # vLLM's first start takes most of a minute

WITH_VLLM = not install_problems("cpu")
KINDS = ["native", *(["titan", "vllm"] if WITH_VLLM else [])]
EXACT = KINDS[:2]
LENGTHS = [1, 16, 5, 30, 1, 33]
SAMPLING = replace(SAMPLED, max_new_tokens=9)


def script(asked, turns: int = 3):
    """Replies of 0 to 40 tokens, and turns of 1 to 8, other ones for each sample."""
    return {
        (r.prompt_id, sample): [
            Continuation(
                r.prompt_id,
                sample,
                tuple(range(20, 20 + (7 * r.prompt_id + 5 * sample + 11 * turn) % 24)),
                1 + (r.prompt_id + sample + turn) % 8,
            )
            for turn in range(turns)
        ]
        for r in asked
        for sample in range(r.num_samples)
    }


def talk(engine, asked, sampling=SAMPLING, turns: int = 3):
    return converse(engine, asked, sampling, Scripted(script(asked, turns)))


@pytest.fixture(scope="module")
def engines(make):
    return {kind: make(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
@torch.no_grad()
def test_all_turns_follow_the_full_forward_over_the_whole_conversation(
    engines, solo_mesh, kind, sampling
):
    asked = requests(2, LENGTHS)
    sampling = replace(sampling, max_new_tokens=9)
    rollouts = talk(engines[kind], asked, sampling)
    assert [r.key for r in rollouts] == sorted(script(asked))
    for rollout in rollouts:
        said = [turn.num_tokens for turn in rollout.turns if turn.sampled]
        replies = [turn.num_tokens for turn in rollout.turns if not turn.sampled]
        known = script(asked)[rollout.key]
        assert replies == [len(one.reply) for one in known]
        assert all(n <= one.max_new_tokens for n, one in zip(said[1:], known, strict=True))
        assert len(rollout.logprobs) == sum(said) == rollout.length
    batch = packed([list(r.prompt_tokens + r.tokens) for r in rollouts])
    model = policy(solo_mesh, 4)
    scores_A = batch.scores(model, sampling.temperature or 1.0).logprobs_A
    for rollout, scores in zip(
        rollouts, scores_A.split([n - 1 for n in batch.lengths]), strict=True
    ):
        places = torch.tensor(rollout.loss_indices) + len(rollout.prompt_tokens) - 1
        logprobs = torch.tensor(rollout.logprobs)
        torch.testing.assert_close(logprobs, scores[places], rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_go_by_the_position_in_the_conversation(engines, kind):
    """A turn has the tokens that one long answer has from there on, where the reply is what that
    answer would have said.
    """
    long = replace(SAMPLING, max_new_tokens=30, stop_tokens=())
    asked = requests(2, [5, 17])
    whole = {c.key: c for c in engines["native"].generate(asked, long)}
    taken = {
        key: [Continuation(*key, c.tokens[9:20], 3), Continuation(*key, c.tokens[23:24], 6)]
        for key, c in whole.items()
    }
    cut = replace(long, max_new_tokens=9)
    for rollout in converse(engines[kind], asked, cut, Scripted(taken)):
        assert rollout.tokens == whole[rollout.key].tokens
        assert [turn.num_tokens for turn in rollout.turns] == [9, 11, 3, 1, 6]


SETTINGS = {
    "no prefix cache": {"prefix_cache": False},
    "two at a time": {"max_sequences": 2},
    "chunked": {"prefill_tokens": 7},
    "small pages": {"page_size": 5, "prefill_tokens": 11},
    "no room for what waits": {"kv_tokens": MAX_LENGTH, "page_size": 4, "max_sequences": 4},
    "no room for what runs": {"kv_tokens": MAX_LENGTH, "page_size": 4, "max_sequences": 40},
}


@pytest.fixture(scope="module")
def exact(make):
    """Conversations of a roomy native engine with exact kernels."""
    with batch_invariant(True, "cpu"):
        return talk(make("native"), requests(3, LENGTHS))


@pytest.mark.parametrize("case", SETTINGS)
def test_what_is_kept_between_turns_changes_no_bit(make, exact, case):
    with batch_invariant(True, "cpu"):
        engine = make("native", **SETTINGS[case])
        assert talk(engine, requests(3, LENGTHS)) == exact
    assert engine.preemptions > 0 or case != "no room for what runs"
    assert not engine.kept and not engine.unfinished


@pytest.mark.parametrize("changes", [{}, {"prefill_tokens": 32}, {"kv_tokens": MAX_LENGTH}])
@pytest.mark.skipif(not WITH_VLLM, reason="vLLM is not installed")
def test_the_trainers_model_in_vllm_has_the_native_engines_bits(make, exact, changes):
    with batch_invariant(True, "cpu"):
        engine = make("titan", **changes)
        assert talk(engine, requests(3, LENGTHS)) == exact


def test_a_kept_turn_computes_its_reply_alone(make):
    """The native engine: the last token of the turn and those of the reply but the last; vLLM: what
    lies beyond the last full page.
    """
    (request,) = requests(1, [16])
    reply = tuple(range(20, 30))
    for kind, first in [("native", 24), *([("titan", 0)] if WITH_VLLM else [])]:
        engine, seen = make(kind), []
        engine.observer = lambda rows, seen=seen: seen.append([position for *_, position in rows])
        engine.add([replace(request, keeps=True)], replace(GREEDY, max_new_tokens=9))
        while not engine.kept:
            engine.step()
        while engine.unfinished:
            engine.step()
        seen.clear()
        engine.extend([Continuation(*next(iter(engine.kept)), reply, 1)])
        while engine.unfinished:
            engine.step()
        engine.drop(list(engine.kept))
        engine.observer = None
        computed = [position for rows in seen for position in rows]
        assert computed == list(range(first, 16 + 9 + 10))


@pytest.mark.skipif(not WITH_VLLM, reason="vLLM is not installed")
def test_vllm_finds_the_full_pages_of_earlier_turns(make):
    (request,) = requests(1, [40])
    engine, seen = make("titan"), []
    engine.add([replace(request, keeps=True)], replace(GREEDY, max_new_tokens=30))
    while not engine.kept or engine.unfinished:
        engine.step()
    engine.observer = lambda rows: seen.extend(position for *_, position in rows)
    engine.extend([Continuation(request.prompt_id, 0, (20, 21), 1)])
    while engine.unfinished:
        engine.step()
    engine.observer = None
    engine.drop(list(engine.kept))
    assert seen == list(range(64, 72)), "two pages of 32 tokens are full"


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_does_not_hold_up_others(make, kind):
    """The cache has room for one conversation, which waits for its reply all the while."""
    page = 32
    engine = make(kind, kv_tokens=MAX_LENGTH, page_size=page)
    first, *others = requests(1, [60, 60, 60, 33])
    alone = talk(engine, [first], turns=1)
    engine.add([replace(first, keeps=True)], SAMPLING)
    turns: list[Completion] = []
    while not turns:
        turns += engine.step()
    engine.add(others, SAMPLING)
    found = []
    while engine.unfinished:
        found += engine.step()
    assert {c.prompt_id for c in found} == {r.prompt_id for r in others}
    assert list(engine.kept) == [(first.prompt_id, 0)]
    engine.extend(script([first], 1)[first.prompt_id, 0])
    while engine.unfinished:
        turns += engine.step()
    engine.drop(list(engine.kept))
    assert [c.tokens for c in turns][0] == alone[0].tokens[: len(turns[0].tokens)]
    assert [c.tokens for c in turns][1] == alone[0].tokens[-len(turns[1].tokens) :]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_continuations_are_refused_before_anything_runs(engines, kind):
    engine, (request,) = engines[kind], requests(1, [5])
    key = request.prompt_id, 0
    engine.add([replace(request, keeps=True)], SAMPLING)
    with pytest.raises(ValueError, match="waits for its next turn where"):
        engine.extend([Continuation(*key, (), 1)])
    while engine.unfinished:
        engine.step()
    with pytest.raises(ValueError, match="gets one at a time"):
        engine.extend([Continuation(*key, (), 1)] * 2)
    with pytest.raises(ValueError, match="do not fit 128 tokens"):
        engine.extend([Continuation(*key, (20,) * 120, 9)])
    with pytest.raises(ValueError, match="a turn has at least one"):
        engine.extend([Continuation(*key, (20,), 0)])
    with pytest.raises(ValueError, match="waits for its next turn where"):
        engine.drop([(key[0], 1)])
    with pytest.raises(ValueError, match="same prompt_id"):
        engine.add([request], SAMPLING)
    with pytest.raises(ValueError, match="one sampling is in flight"):
        engine.add(requests(1, [1, 2])[1:], replace(SAMPLING, step=9))
    with pytest.raises(ValueError, match="drop what it keeps"):
        engine.generate(requests(1, [1, 2])[1:], SAMPLING)
    with pytest.raises(RuntimeError, match="drop what is kept for another turn"):
        engine.reset(version=0)
    assert not engine.unfinished and list(engine.kept) == [key]
    engine.drop([key])
    engine.reset(version=0)


@pytest.mark.parametrize("kind", EXACT)
def test_a_trace_has_every_row_of_a_conversation(engines, kind):
    asked = requests(2, [5, 17])
    rollouts = talk(engines[kind], asked)
    key = rollouts[1].key
    with batch_invariant(True, "cpu"):
        traced = trace_generation(engines[kind], asked, SAMPLING, key, script_of(rollouts))
        native = trace_generation(engines["native"], asked, SAMPLING, key, script_of(rollouts))
    total = rollouts[1].num_tokens
    assert set(traced.positions["layers.0"]) == set(range(total - 1))
    assert len(traced.positions["lm_head"]) == rollouts[1].length
    assert first_difference(traced, native) is None
