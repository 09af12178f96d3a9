"""Stop strings: an answer ends at the first token with which its text has one of them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_tokenizers import KINDS, SENTENCES, tokenizer_of

from mesh.config.loading import load_conf
from mesh.program.assembly import check
from mesh.text.stopping import StopStrings, ends_in
from mesh.types import Completion

TEXT = " ".join(SENTENCES[:3])


def first_end(stops: StopStrings, tokens: list[int], start: int = 0) -> int | None:
    """The specification: the text of every prefix, decoded whole."""
    for end in range(start + 1, len(tokens) + 1):
        text = stops.tokenizer.decode(tokens[start:end])
        if any(string in text for string in stops.strings):
            return end
    return None


def found_end(stops: StopStrings, tokens: list[int], start: int = 0) -> int | None:
    ends = range(start + 1, len(tokens) + 1)
    return next((end for end in ends if stops(tokens[:end], start)), None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_is_found_where_the_decoded_text_first_has_it(kind):
    """Of tokens in any order, and of those of texts, with strings of one character and more."""
    tokenizer = tokenizer_of(kind)
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.has(i)]

    @settings(max_examples=80, deadline=None)
    @given(st.data())
    def holds(data):
        if data.draw(st.booleans()):
            tokens = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=20))
        else:
            text = "".join(c for c in TEXT if tokenizer.backend.encode(c).ids or c == " ")
            begin = data.draw(st.integers(0, len(text) - 2))
            tokens = tokenizer.backend.encode(text[begin:][:60]).ids or [ids[-1]]
        text = tokenizer.decode(tokens)
        begins = st.integers(0, max(0, len(text) - 1))
        pieces = st.builds(lambda i, n: text[i : i + n], begins, st.integers(1, 9))
        strings = (
            data.draw(st.lists(pieces.filter(bool), min_size=1, max_size=3)) if text else ["x"]
        )
        strings = [s for s in strings if "\ufffd" not in s] or ["x"]
        stops = StopStrings(tuple(strings), tokenizer)
        start = data.draw(st.integers(0, len(tokens) - 1))
        assert found_end(stops, tokens) == first_end(stops, tokens)
        assert found_end(stops, tokens, start) == first_end(stops, tokens, start)

    holds()


def test_a_string_ends_within_a_token_that_holds_more():
    """`.\\n\\n` is one token, `</calc>` several, and `ÿ` ends with the second of its bytes."""
    tokenizer = tokenizer_of("byte-level")
    for text, string in (("it.\n\nQuestion: what", "\n"), ("a <calc>1</calc> x", "</calc>"),
                         ("is ÿ x", "ÿ")):  # fmt: skip
        tokens = tokenizer.encode(text)
        end = found_end(StopStrings((string,), tokenizer), tokens)
        assert string in tokenizer.decode(tokens[:end])
        assert string not in tokenizer.decode(tokens[: end - 1]), "one token later than it could"


def test_only_tokens_in_which_a_string_may_end_are_decoded():
    tokenizer = tokenizer_of("byte-level")
    endings = StopStrings(("</calc>",), tokenizer).endings
    texts = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
    whole = {texts[i] for i in endings if "\ufffd" not in texts[i]}
    assert ">" in whole and whole <= {t for t in texts.values() if ">" in t}
    assert [ends_in("</calc>", t) for t in (">", "> and", "c> x", "<", "x>", "a</calc>b", "")] == [
        True, True, True, False, False, True, False,
    ]  # fmt: skip


def test_the_string_stays_in_the_response_and_a_stop_token_does_not():
    tokenizer = tokenizer_of("byte-level")
    (end,) = tokenizer.eos_ids
    text = tuple(tokenizer.encode("<calc>12*7</calc>"))
    stopped = Completion(0, 0, text, (0.0,) * len(text), "stop")
    ended = Completion(0, 0, (*text, end), (0.0,) * len(text), "stop")
    assert tokenizer.response(stopped) == tokenizer.response(ended) == "<calc>12*7</calc>"


def test_the_check_costs_less_than_one_percent_of_a_decode_step():
    """At 512 sequences, of 8 ms at the very least on a GPU; one token in 20 is decoded."""
    tokenizer = tokenizer_of("byte-level")
    stops = StopStrings(("</calc>", "\nQuestion:"), tokenizer)
    hit, miss = (
        next(iter(sorted(stops.endings))),
        next(i for i in range(600) if i not in stops.endings),
    )
    rows = [[miss] * 200 + [hit if row % 20 == 0 else miss] for row in range(512)]
    stops(rows[0])

    def step() -> float:
        began = time.perf_counter()
        for row in rows:
            stops(row, 0)
        return time.perf_counter() - began

    assert min(step() for _ in range(20)) < 0.01 * 0.008 * 5, "five times what it may take"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "['']",
            r"generator.stop=\[\]: the empty text would end every response",
        ),
        ("[é]", r"generator.stop=\[é\]: no response could end with it: the tokenizer in .* 'é'"),
    ],
)
def test_strings_that_are_no_use_are_refused(process, value, said):
    conf = load_conf(["conf=qwen3_tiny", f"generator.stop={value}"])[1]
    with pytest.raises(ValueError, match=said):
        check(conf, process)


def test_a_plan_has_them_and_they_are_compared_by_their_texts(process):
    conf = load_conf(["conf=qwen3_tiny", 'generator.stop=[</calc>, "a\\nb"]'])[1]
    stops = check(conf, process).generator.stops
    assert stops == StopStrings(("</calc>", "a\nb"), tokenizer_of("byte-level"))
    assert repr(stops) == "StopStrings(strings=('</calc>', 'a\\nb'))"
    assert stops != StopStrings(("</calc>",), stops.tokenizer)
    assert check(load_conf(["conf=qwen3_tiny"])[1], process).generator.stops is None
