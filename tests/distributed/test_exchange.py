"""Rollouts cross from generator ranks to trainer ranks: each to its owner, once, unchanged."""

from __future__ import annotations

import pytest
import torch
from launching import launch
from programs.exchange_program import CASES, GROUP_SIZE, NUM_WAVES, prompt_ids, rollout

from mesh.layout.meshes import plan_layout
from mesh.rl.cutting import owner
from mesh.types import outline


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """waves[rank][case]: what each of four real ranks saw."""
    directory = tmp_path_factory.mktemp("exchange")
    launch("tests/programs/exchange_program.py", 1, str(directory))
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
            assert waves[rank][case][wave].outlines == list(map(outline, sent))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("split")])
def test_off_the_trainer_a_wave_is_empty(waves, case):
    layout = plan_layout(CASES[case], 4)
    for rank in set(range(4)) - set(layout.trainer_ranks):
        assert [(w.outlines, w.rollouts) for w in waves[rank][case]] == [([], [])] * NUM_WAVES
