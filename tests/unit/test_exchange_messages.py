"""Messages of the exchange: packed, outlined, merged. Four ranks: distributed/test_exchange.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs.exchange_program import rollout

from mesh.exchange.rollouts import (
    COLUMNS,
    _merge,
    _outlines,
    _parts,
    _payload,
    _payload_length,
    _table,
    _unpack,
    replica_of,
)
from mesh.rl.advantages import rewards_of
from mesh.types import FINISH_REASONS, Outline, Rollout, Turn, outline

TOKENS = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
TURN = st.builds(Turn, st.integers(0, 3), st.booleans())


@st.composite
def rollouts(draw) -> list[Rollout]:
    """Some without turns, some with."""
    found = []
    for sample_id in range(draw(st.integers(0, 5))):
        turns = tuple(draw(st.lists(TURN, max_size=4)))
        tokens = draw(TOKENS)
        if turns:
            tokens = tuple(range(sum(turn.num_tokens for turn in turns)))
        sampled = sum(turn.num_tokens for turn in turns if turn.sampled) if turns else len(tokens)
        logprobs = st.floats(-100, 0, width=32)
        found.append(
            Rollout(
                draw(st.integers(0, 2**40)),
                sample_id,
                draw(TOKENS),
                tokens,
                tuple(draw(logprobs) for _ in range(sampled)),
                draw(st.floats(-10, 10)),
                draw(st.sampled_from(FINISH_REASONS)),
                turns,
                tuple(draw(st.dictionaries(st.text(), st.floats(-1e100, 1e100))).items()),
                draw(st.sampled_from([None, False, True])),
            )
        )
    return found


@given(rollouts())
def test_what_is_unpacked_was_packed(sent):
    table, parts, payload = _table(sent), _parts(sent), _payload(sent)
    outlines, rows = _outlines(table, parts), table.tolist()
    assert outlines == [outline(r) for r in sent]
    assert _unpack(list(zip(outlines, rows, strict=True)), *payload) == sent
    # what the receiver has room for
    assert len(parts) == table[:, -1].sum()
    assert len(payload[0]) == sum(map(_payload_length, rows))
    assert len(payload[1]) == sum(r.length for r in sent)


def test_outline_by_hand():
    sent = rollout(4, 2)
    table = _table([sent])
    assert table.shape == (1, COLUMNS) and table.dtype == torch.float64
    by_hand = Outline(4, 2, 5, 7, 4 / 3 + 2, "stop", (("sample", 2.0), ("é", -2 / 3)), True)
    assert _outlines(table, _parts([sent])) == [by_hand] == [outline(sent)]


def test_merged_outlines_are_in_order_and_counted():
    sent = [rollout(p, g) for p in (2, 0) for g in (1, 0)]
    parts = [([outline(r) for r in sent[:3]], sent[:3]), ([outline(sent[3])], [])]
    wave = _merge(parts, expected=4)
    assert [o.key for o in wave.outlines] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert [r.key for r in wave.rollouts] == [(0, 1), (2, 0), (2, 1)]
    rewards_PG = rewards_of(wave, group_size=2)
    assert rewards_PG.tolist() == [[0, 1], [2 / 3, 2 / 3 + 1]]
    with pytest.raises(AssertionError, match="4 rollouts arrived, 6 were due"):
        _merge(parts, expected=6)


def test_every_prompt_has_one_replica_and_equal_waves_give_equal_work():
    assert [replica_of(prompt_id, 3) for prompt_id in range(6, 12)] == [0, 1, 2, 0, 1, 2]
