"""Rollouts cross from generator ranks to trainer ranks: each to its owner, once, unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import launch

from mesh.exchange.rollouts import _merge, _outlines, _payload, _table, _unpack, replica_of
from mesh.layout.meshes import plan_layout
from mesh.rl.packing import owner
from mesh.types import Outline, Rollout

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))
from exchange_program import CASES, GROUP_SIZE, NUM_WAVES, prompt_ids, rollout  # noqa: E402

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


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """waves[rank][case]: what each of four real ranks saw."""
    directory = tmp_path_factory.mktemp("exchange")
    launch("tests/programs/exchange_program.py", 4, str(directory))
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("case", CASES)
def test_every_rollout_reaches_its_owner_once_and_unchanged(waves, case):
    layout = plan_layout(CASES[case], 4)
    for wave in range(NUM_WAVES):
        sent = [rollout(p, g) for p in prompt_ids(CASES[case], wave) for g in range(GROUP_SIZE)]
        for place, rank in enumerate(layout.trainer_ranks):
            dp = place // layout.trainer.tp
            owned = [r for r in sent if owner(r.prompt_id, layout.trainer.dp) == dp]
            assert owned and waves[rank][case][wave].rollouts == owned


@pytest.mark.parametrize("case", CASES)
def test_every_trainer_rank_knows_the_outline_of_all(waves, case):
    layout = plan_layout(CASES[case], 4)
    for wave in range(NUM_WAVES):
        sent = [rollout(p, g) for p in prompt_ids(CASES[case], wave) for g in range(GROUP_SIZE)]
        for rank in layout.trainer_ranks:
            assert waves[rank][case][wave].outlines == _outlines(_table(sent))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("split")])
def test_off_the_trainer_a_wave_is_empty(waves, case):
    layout = plan_layout(CASES[case], 4)
    for rank in set(range(4)) - set(layout.trainer_ranks):
        assert [(w.outlines, w.rollouts) for w in waves[rank][case]] == [([], [])] * NUM_WAVES
