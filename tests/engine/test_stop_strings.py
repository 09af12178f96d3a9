"""Stop strings in every engine: the tokens of an answer without them, up to where they end it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_engines import SAMPLED, SHAPE, Maker, assert_same, requests

from mesh.text.stopping import StopStrings
from mesh.text.tokenizer import CHARACTERS, load_tokenizer

TOKENIZER = load_tokenizer(CHARACTERS)
NAMED = replace(SHAPE, textless=((TOKENIZER.vocab_size, SHAPE.vocab_size),))
FREE = replace(SAMPLED, stop_tokens=())


@pytest.fixture(scope="module")
def make(solo_mesh):
    maker = Maker(solo_mesh)
    yield maker
    for engine in maker.built:
        engine.close()


@pytest.fixture(scope="module")
def expected(make):
    """(sampling, completions cut by the specification): of a native engine that nothing stops."""
    whole = make("native", shape=NAMED).generate(requests(), FREE)
    texts = [TOKENIZER.decode(c.tokens) for c in whole]
    # of several characters, of one, and the very end, where the longest response ends too
    strings = (texts[1][4:7], texts[5][9], texts[8][-2:], texts[20][:1])
    assert len({len(string) for string in strings}) == 3, "characters are tokens"
    cut = []
    for completion in whole:
        end = next(
            (n for n in range(1, len(completion.tokens) + 1)
             if any(s in TOKENIZER.decode(completion.tokens[:n]) for s in strings)), None,
        )  # fmt: skip
        reason = "length" if end is None else "stop"
        cut.append(replace(
            completion, tokens=completion.tokens[:end], logprobs=completion.logprobs[:end],
            finish_reason=reason,
        ))  # fmt: skip
    assert {c.finish_reason for c in cut} == {"stop", "length"}
    assert cut[8].finish_reason == "stop" and len(cut[20].tokens) == 1
    return replace(FREE, stops=StopStrings(strings, TOKENIZER)), cut


@pytest.mark.parametrize("kind", ["native", "titan", "vllm"])
def test_engines_stop_at_the_same_token(make, expected, kind):
    sampling, cut = expected
    assert_same(make(kind, shape=NAMED).generate(requests(), sampling), cut)


@pytest.mark.parametrize("kind", ["native", "titan"])
def test_a_small_cache_changes_nothing(make, expected, kind):
    """Preempted sequences are recomputed, and what they said before still counts."""
    sampling, cut = expected
    engine = make(kind, shape=NAMED, max_sequences=8, kv_tokens=256)
    assert_same(engine.generate(requests(), sampling), cut)
    assert engine.preemptions > 0


def test_stop_tokens_and_strings_end_answers_side_by_side(make, expected):
    sampling, cut = expected
    both = replace(sampling, stop_tokens=SAMPLED.stop_tokens)
    completions = make("native", shape=NAMED).generate(requests(), both)
    for completion, string_only in zip(completions, cut, strict=True):
        ends = [i for i, t in enumerate(string_only.tokens, 1) if t in SAMPLED.stop_tokens]
        assert len(completion.tokens) == min([len(string_only.tokens), *ends])


def test_the_next_requests_stop_by_their_own_strings(make, expected):
    sampling, cut = expected
    for kind in ("native", "titan"):
        engine = make(kind, shape=NAMED)
        assert_same(engine.generate(requests(), sampling), cut)
        free = engine.generate(requests(), FREE)
        assert {len(c.tokens) for c in free} == {FREE.max_new_tokens}
