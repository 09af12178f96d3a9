"""The optimizer against torch's own, its schedule by hand, and the keys that it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_trainer import conf_of, trainer_of
from test_checkpoint import advance

from mesh.config.changes import changed
from mesh.config.keys import override_problems
from mesh.config.loading import load_conf, read_conf, save_conf
from mesh.config.schema import Conf
from mesh.layout.holdings import local_tensors
from mesh.program.optimizer_checks import optimizer_problems
from mesh.program.plan import optimizer_settings
from mesh.roles.optimizer import OptimizerSettings, lr_at
from mesh.roles.trainer import Trainer


def rates(steps: int, *words: str) -> list[float]:
    """Learning rates of the first steps of a run with a peak of 2."""
    settings = optimizer_settings(conf_of("trainer.lr=2", *words))
    return [lr_at(step, settings) for step in range(steps)]


def test_without_decay_the_rate_stays_at_the_peak():
    assert rates(4, "trainer.warmup_steps=4") == [0.5, 1.0, 1.5, 2.0]
    assert set(rates(99)) == {2.0}


def test_linear_decay_ends_at_the_floor_and_stays_there():
    words = ["trainer.decay=linear", "trainer.lr_floor=0.25", "trainer.warmup_steps=2", "steps=6"]
    assert rates(8, *words) == [1.0, 2.0, 2.0, 1.625, 1.25, 0.875, 0.5, 0.5]
    assert rates(8, *words, "trainer.lr_floor=0")[-3:] == [0.5, 0.0, 0.0]


def test_cosine_decay_is_half_a_cosine_above_the_floor():
    words = ["trainer.decay=cosine", "trainer.lr_floor=0.1", "steps=4"]
    by_hand = [0.2 + 1.8 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert rates(5, *words) == pytest.approx(by_hand, abs=1e-15)
    assert rates(7, *words)[4:] == pytest.approx([0.2] * 3, abs=1e-15)


def test_the_decay_may_be_shorter_than_the_run():
    assert rates(6, "trainer.decay=linear", "trainer.decay_steps=4", "steps=99") == [
        2.0, 1.5, 1.0, 0.5, 0.0, 0.0,
    ]  # fmt: skip


def test_the_trainer_takes_the_rate_of_its_step(solo_mesh):
    conf = conf_of("trainer.lr=1e-3", "trainer.decay=linear", "steps=4")
    trainer = trainer_of(conf)
    assert [advance(trainer, n)["lr"] for n in range(5)] == [1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0]


def reference(trainer: Trainer, conf: Conf, undecayed: set[str]) -> dict[str, torch.Tensor]:
    """The weights after three updates of `advance` by torch's AdamW, without clipping."""
    weights = {n: w.detach().clone() for n, w in local_tensors(trainer.masters()).items()}
    keys = conf.trainer
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for n, w in weights.items() if n not in undecayed]},
            {"params": [w for n, w in weights.items() if n in undecayed], "weight_decay": 0.0},
        ],
        lr=keys.lr, betas=keys.betas, eps=keys.eps, weight_decay=keys.weight_decay,
        fused=keys.fused or None,
    )  # fmt: skip
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for weight in weights.values():
            weight.grad = torch.empty_like(weight).normal_(generator=generator)
        optimizer.step()
    return weights


FREE = ["trainer.weight_decay=0.5", "trainer.clip_norm=0", "trainer.lr=1e-2"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("on", ["all", "matrices"])
def test_three_updates_are_those_of_torch(solo_mesh, on, fused):
    """To the bit; the tiny model is tied: its head is the embedding, which does not decay."""
    conf = conf_of(*FREE, f"trainer.weight_decay_on={on}", f"trainer.fused={str(fused).lower()}")
    trainer = trainer_of(conf)
    names = [name for name, weight in trainer.masters().items() if weight.dim() == 1]
    undecayed = {"tok_embeddings.weight", *names} if on == "matrices" else set()
    expected = reference(trainer, conf, undecayed)
    assert len(names) > 5 and len(expected) > len(names) + 5
    for seed in range(3):
        advance(trainer, seed)
    for name, weight in local_tensors(trainer.masters()).items():
        assert torch.equal(weight, expected[name]), name
    other = reference(trainer_of(conf), conf, set() if undecayed else set(names))
    assert not all(torch.equal(other[name], expected[name]) for name in names)


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_does_not_depend_on_how_a_weight_is_cut(fused):
    """Uneven pieces, so that the ends of vectors fall everywhere: layouts keep the bits."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4099, generator=generator)
    gradients = [torch.randn(4099, generator=generator) * 10**-i for i in range(4)]

    def updated(start: int, end: int) -> torch.Tensor:
        weight = whole[start:end].clone().requires_grad_()
        adamw = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=fused or None)
        for gradient in gradients:
            weight.grad = gradient[start:end].clone()
            adamw.step()
        return weight.detach()

    edges = [0, 1, 8, 25, 1000, 2003, 2004, 4099]
    pieces = [updated(*pair) for pair in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(pieces), updated(0, 4099))


def test_keys_of_a_decay_that_there_is_not_are_refused():
    conf = conf_of(
        "trainer.lr_floor=0.1", "trainer.decay_steps=7", "trainer.weight_decay_on=matrices"
    )
    assert optimizer_problems(conf) == [
        "trainer.lr_floor=0.1: trainer.decay=none keeps the learning rate after the warm-up; set "
        "trainer.decay=linear or cosine, or leave it out",
        "trainer.decay_steps=7: trainer.decay=none keeps the learning rate after the warm-up; set "
        "trainer.decay=linear or cosine, or leave it out",
        "trainer.weight_decay_on=matrices: trainer.weight_decay=0: no weight decays; set "
        "trainer.weight_decay, e.g. 0.1",
    ]
    short = ["trainer.decay=cosine", "trainer.decay_steps=7", "trainer.warmup_steps=7"]
    assert optimizer_problems(conf_of(*short)) == [
        "trainer.decay_steps=7: the decay ends before trainer.warmup_steps=7 have passed; use at "
        "least 8, counted from the first step of the run"
    ]
    assert optimizer_problems(conf_of(*short, "trainer.decay_steps=8")) == []


def test_a_resumed_run_keeps_the_steps_over_which_its_rate_decays():
    saved = conf_of("trainer.decay=linear", "steps=50")
    (wrong,) = override_problems(saved, changed(saved, {"steps": 60}))
    assert wrong == (
        "steps=60: the run's learning rate decays over 50 steps (trainer.decay_steps); leave it "
        "out, or start a new run"
    )
    fixed = changed(saved, {"trainer.decay_steps": 50})
    assert override_problems(fixed, changed(fixed, {"steps": 60})) == []
    assert len(override_problems(fixed, changed(fixed, {"trainer.decay_steps": 60}))) == 1


def test_sft_decay_has_moved(tmp_path: Path):
    """Every older config.yaml has it, with its default, and is still read."""
    with pytest.raises(ValueError, match="sft.decay=linear: this key has moved; write trainer.dec"):
        load_conf(["conf=qwen3_tiny", "sft.decay=linear"])
    path = tmp_path / "config.yaml"
    save_conf(conf_of(), path)
    text = path.read_text()
    path.write_text(text.replace("sft:\n", "sft:\n  decay: none\n"))
    assert path.read_text() != text and read_conf(path) == conf_of()
    path.write_text(text.replace("sft:\n", "sft:\n  decay: cosine\n"))
    with pytest.raises(ValueError, match="sft.decay=cosine: this key has moved; write trainer.dec"):
        read_conf(path)


def test_the_settings_of_before_keep_their_meaning():
    """Positional, as programs of several ranks write them."""
    settings = OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.0, 0, 1.0)
    assert (settings.decay, settings.weight_decay_on, settings.fused) == ("none", "all", False)
    assert lr_at(10**6, settings) == 1e-3
