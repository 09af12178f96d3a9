"""Averaged weights: their values, what moves them, and where they go. Checkpoints of them:
test_optimizer_resume.py; the runs: distributed/test_ema_runs.py.
"""

from __future__ import annotations

import pytest
import torch
from small_trainer import conf_of, trainer_of
from test_checkpoint import advance, advance_badly, advance_without_signal

from mesh.layout.holdings import local_tensors
from mesh.roles.averaging import AveragedWeights
from mesh.roles.trainer import Trainer

Weights = dict[str, torch.Tensor]


def copies(tensors: Weights) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in local_tensors(tensors).items()}


def same(mine: Weights, theirs: Weights) -> bool:
    assert mine.keys() == theirs.keys() and len(mine) > 20
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def averaging(*words: str) -> Trainer:
    return trainer_of(conf_of("ema=0.75", "trainer.lr=1e-2", *words))


def test_the_average_is_the_weighted_sum_of_all_weights(solo_mesh):
    """By hand in float64: 0.75^n of the start, and 0.25 x 0.75^(n - i) of what update i left."""
    trainer = averaging()
    seen = [copies(trainer.parameters())]
    assert same(copies(trainer.answering()), seen[0]), "it begins at the start"
    for seed in range(4):
        advance(trainer, seed)
        seen.append(copies(trainer.parameters()))
    shares = [0.75**4, *(0.25 * 0.75 ** (4 - i) for i in range(1, 5))]
    assert sum(shares) == 1
    for name, average in copies(trainer.answering()).items():
        expected = sum(w * one[name].double() for w, one in zip(shares, seen, strict=True))
        assert torch.allclose(average.double(), expected, rtol=1e-6, atol=1e-7), name
    assert not same(copies(trainer.answering()), seen[-1])


def test_the_rule_is_three_rounded_operations():
    weights = {"w": torch.tensor([1.0, 3.0]), "same": torch.tensor([0.1])}
    averaged = AveragedWeights(weights, 0.9)
    weights["w"] += torch.tensor([1.0, -1e-3])
    averaged.move()
    rule = weights["w"] + (torch.tensor([1.0, 3.0]) - weights["w"]) * 0.9
    assert torch.equal(averaged.tensors["w"], rule) and rule[0] == pytest.approx(1.1)
    assert torch.equal(averaged.tensors["same"], weights["same"]), "what does not move has no drift"


def test_the_trainer_takes_the_same_steps_with_and_without(solo_mesh):
    trainer, plain = averaging(), trainer_of(conf_of("trainer.lr=1e-2"))
    assert [advance(trainer, n) for n in range(3)] == [advance(plain, n) for n in range(3)]
    assert same(copies(trainer.parameters()), copies(plain.parameters()))
    assert plain.answering() == plain.parameters() and not plain.averages
    assert "ema" not in plain.state() and trainer.state().keys() - plain.state() == {"ema"}


def test_steps_without_an_update_do_not_move_it(solo_mesh):
    """Skipped, and without signal; weights have moved before, so the average would."""
    trainer = averaging("on_nonfinite=skip")
    advance(trainer, 1)
    before = copies(trainer.answering())
    assert not same(before, copies(trainer.parameters()))
    assert advance_badly(trainer)["skipped"] == 1
    assert advance_without_signal(trainer)["steps_without_signal"] == 1
    assert same(copies(trainer.answering()), before)
    advance(trainer, 2)
    assert not same(copies(trainer.answering()), before)


def test_a_restarted_trainer_averages_from_its_new_start(solo_mesh):
    trainer = averaging()
    start = copies(trainer.parameters())
    advance(trainer, 1)
    trainer.restart(start)
    assert same(copies(trainer.answering()), start)


def test_a_tied_weight_has_both_its_names(solo_mesh):
    answering = averaging().answering()
    assert answering["lm_head.weight"] is answering["tok_embeddings.weight"]
    assert answering.keys() == averaging().parameters().keys()
