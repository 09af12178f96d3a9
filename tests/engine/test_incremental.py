"""Engines a step at a time: `add`, `step` and `unfinished`, of which `generate` is the loop."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from small_engines import GREEDY, LENGTHS, SAMPLED, assert_same, requests

from mesh.engine.vllm.checks import install_problems
from mesh.invariant.switch import batch_invariant
from mesh.types import Completion, Request

pytestmark = pytest.mark.timeout(600)  # the first start of vLLM takes most of a minute

vllm = pytest.mark.skipif(bool(install_problems("cpu")), reason="needs vLLM")
NATIVE, TITAN, OWN = "native", pytest.param("titan", marks=vllm), pytest.param("vllm", marks=vllm)
TIGHT = {"kv_tokens": 192, "page_size": 16, "prefill_tokens": 24, "max_sequences": 8}
LONG = [*LENGTHS, 107, 90, 31, 32]


def by_key(completions: list[Completion]) -> list[Completion]:
    return sorted(completions, key=lambda c: (c.prompt_id, c.sample_id))


def drained(engine) -> list[Completion]:
    """What all further steps finish."""
    found = []
    while engine.unfinished:
        found += engine.step()
    return found


def arriving(engine, asked: list[Request], every: int, sampling=SAMPLED) -> list[Completion]:
    """Each request is added `every` steps after the one before, finished or not."""
    found = []
    for request in asked:
        engine.add([request], sampling)
        for _ in range(every):
            found += engine.step()
    return found + drained(engine)


@pytest.fixture(scope="module")
def engines(make):
    """A roomy engine of a kind, made once."""
    return cache(make)


@pytest.mark.parametrize("kind", [NATIVE, TITAN, OWN])
def test_steps_return_each_completion_once_as_soon_as_it_is_finished(engines, kind):
    engine = engines(kind)
    expected = engine.generate(requests(), SAMPLED)
    engine.add(requests(), SAMPLED)
    assert engine.unfinished
    found, lengths = [], []
    while engine.unfinished:
        finished = engine.step()
        assert len({len(completion.tokens) for completion in finished}) <= 1
        lengths += [len(completion.tokens) for completion in finished]
        found += finished
    assert_same(by_key(found), expected)
    assert lengths == sorted(lengths), "in a roomy engine all sequences grow together"
    assert len(set(lengths)) > 5
    assert engine.step() == []


def test_a_completion_of_n_tokens_is_returned_by_the_nth_step(engines):
    engine = engines("native")
    engine.add(requests(), SAMPLED)
    for step in range(1, SAMPLED.max_new_tokens + 1):
        assert all(len(completion.tokens) == step for completion in engine.step())
    assert not engine.unfinished


@pytest.mark.parametrize("kind", [NATIVE, TITAN])
@pytest.mark.parametrize("cramped", [False, True])
def test_requests_that_arrive_while_others_run_have_the_bits_of_all_at_once(make, kind, cramped):
    """From one after the other to all at once; cramped, sequences wait and are preempted."""
    with batch_invariant(True, "cpu"):
        expected = make(NATIVE).generate(requests(4, LONG), SAMPLED)
        engine = make(kind, **(TIGHT if cramped else {}))
        for every in (0, 1, 3, 30):
            assert by_key(arriving(engine, requests(4, LONG)[::-1], every)) == expected
        assert engine.generate(requests(4, LONG), SAMPLED) == expected
    assert (engine.preemptions > 0) == cramped


@pytest.mark.parametrize("kind", [NATIVE, TITAN])
def test_a_prompt_id_can_be_used_again_for_another_prompt_while_others_run(engines, kind):
    """What is cached for the first prompt, or still in flight, is not the second one's."""
    engine = engines(kind)
    (long, first), other = requests(2, [5, 70]), requests(2, [70, 69])[0]
    first, other = (replace(request, prompt_id=1) for request in (first, other))
    short = replace(SAMPLED, stop_tokens=tuple(range(64)))
    expected = [engines(NATIVE).generate([request], short) for request in (first, other)]
    engine.add([long, first], short)
    for round_expected, following in zip(expected, ([other], []), strict=True):
        found = []
        while len(found) < 2:
            found += [c for c in engine.step() if c.prompt_id == 1]
        assert_same(by_key(found), round_expected)
        engine.add(following, short)
    drained(engine)


@pytest.mark.parametrize("kind", [NATIVE, TITAN])
def test_what_would_be_ambiguous_is_refused_and_changes_nothing(engines, kind):
    engine, asked = engines(kind), requests(2, [5, 7])
    expected = engine.generate(asked[:1], SAMPLED)
    engine.add(asked[:1], SAMPLED)
    engine.step()
    with pytest.raises(ValueError, match="requests with Sampling.*top_k=0.* are unfinished"):
        engine.add(asked[1:], replace(SAMPLED, top_k=5))
    with pytest.raises(ValueError, match="same prompt_id=10"):
        engine.add(asked[:1], SAMPLED)
    with pytest.raises(ValueError, match="prompt 17: 200 prompt tokens .* do not fit"):
        engine.add([Request(24, (1, 2), 1), Request(17, (1,) * 200, 1)], SAMPLED)
    with pytest.raises(ValueError, match="has unfinished requests"):
        engine.generate(asked[1:], SAMPLED)
    with pytest.raises(RuntimeError, match="new weights while requests are unfinished"):
        engine.reset(version=engine.version)
    assert_same(by_key(drained(engine)), expected)
    greedy = engine.generate(asked, GREEDY)
    assert {c.prompt_id for c in greedy} == {10, 17}, "idle, it takes another sampling"


def test_a_step_that_fails_leaves_the_native_engine_empty(engines):
    engine = engines(NATIVE)
    expected = engine.generate(requests(), SAMPLED)

    def fail(rows):
        raise OSError("no observer")

    engine.add(requests(), SAMPLED)
    engine.step()
    engine.observer = fail
    with pytest.raises(OSError, match="no observer"):
        engine.step()
    engine.observer = None
    assert not engine.unfinished and engine.step() == []
    assert engine.generate(requests(), SAMPLED) == expected
