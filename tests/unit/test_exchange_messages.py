"""Messages of the exchange: packed, outlined, merged. Four ranks: distributed/test_exchange.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs.exchange_program import rollout

from mesh.exchange.rollouts import _merge, _outlines, _payload, _table, _unpack, replica_of
from mesh.types import Outline, Rollout

TOKENS = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)


@st.composite
def rollouts(draw) -> list[Rollout]:
    found = []
    for sample_id in range(draw(st.integers(0, 5))):
        tokens = draw(TOKENS)
        logprobs = st.floats(-100, 0, width=32)
        found.append(
            Rollout(
                draw(st.integers(0, 2**40)),
                sample_id,
                draw(TOKENS),
                tokens,
                tuple(draw(logprobs) for _ in tokens),
                draw(st.floats(-10, 10)),
                draw(st.sampled_from(["stop", "length"])),
            )
        )
    return found


@given(rollouts())
def test_what_is_unpacked_was_packed(sent):
    outlines = _outlines(_table(sent))
    assert _unpack(outlines, *_payload(sent)) == sent


def test_outline_by_hand():
    table = _table([rollout(4, 2)])
    assert table.shape == (1, 6) and table.dtype == torch.float64
    assert _outlines(table) == [Outline(4, 2, 2, 5, 4 / 3 + 2, "stop")]


def test_merged_outlines_are_in_order_and_counted():
    sent = [rollout(p, g) for p in (2, 0) for g in (1, 0)]
    parts = [(_table(sent[:3]), sent[:3]), (_table(sent[3:]), [])]
    wave = _merge(parts, expected=4)
    assert [(o.prompt_id, o.sample_id) for o in wave.outlines] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert [(r.prompt_id, r.sample_id) for r in wave.rollouts] == [(0, 1), (2, 0), (2, 1)]
    assert wave.rewards(2).tolist() == [[0, 1], [pytest.approx(2 / 3), pytest.approx(5 / 3)]]
    with pytest.raises(AssertionError, match="4 rollouts arrived, 6 were due"):
        _merge(parts, expected=6)


def test_every_prompt_has_one_replica_and_equal_waves_give_equal_work():
    assert [replica_of(prompt_id, 3) for prompt_id in range(6, 12)] == [0, 1, 2, 0, 1, 2]
