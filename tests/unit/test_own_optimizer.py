"""trainer.optimizer=MODULE:NAME: what is refused at the start, and its steps against torch's.
Checkpoints of it: test_optimizer_resume.py; real ranks: faults/test_optimizer_resumed.py.
"""

from __future__ import annotations

import pytest
import torch
from small_trainer import conf_of, trainer_of
from test_checkpoint import advance

from mesh.layout.holdings import local_tensors
from mesh.program.optimizer_checks import own_problems


def problems_of(name: str, *words: str) -> list[str]:
    return own_problems(conf_of(f"trainer.optimizer={name}", *words))


ARGS = "trainer.optimizer_args"
SGD = "trainer.optimizer=torch.optim:SGD"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("user_optimizers:SignMomentum", [f"{ARGS}.beta=0.8", "trainer.weight_decay=0.1"]),
        ("torch.optim:SGD", [f"{ARGS}.momentum=0.9", f"{ARGS}.nesterov=true"]),
        ("torch.optim:AdamW", [f"{ARGS}.betas=[0.9, 0.99]", "trainer.weight_decay_on=matrices"]),
        ("torch.optim:Adafactor", []),
        ("torch.optim:NAdam", []),
        ("torch.optim:Adagrad", []),
        ("torch.optim:RMSprop", []),
    ],
    ids=str,
)
def test_what_can_be_resumed_is_taken(name, words):
    assert problems_of(name, *words) == []


@pytest.mark.parametrize(
    ("name", "words", "wrong"),
    [
        ("user_optimizers", [], "trainer.optimizer=user_optimizers: write it as MODULE:NAME"),
        ("nowhere:A", [], "trainer.optimizer=nowhere:A: cannot import nowhere"),
        ("user_optimizers:Any", [], "derives from torch.optim.Optimizer; it has SignMomentum, "),
        (
            "torch.optim:SGD",
            [f"{ARGS}.lr=1"],
            f"{ARGS}.lr=1: this is a key of the run; write train",
        ),
        ("torch.optim:SGD", [f"{ARGS}.weight_decay=1"], "write trainer.weight_decay=1"),
        (
            "torch.optim:SGD",
            [f"{ARGS}.beta=1"],
            "has no such setting; it takes momentum, dampening",
        ),
        (
            "torch.optim:SGD",
            [f"{ARGS}.momentum=much"],
            f"{ARGS}.momentum=much: cannot be read as fl",
        ),
        ("torch.optim:SGD", ["trainer.fused=true"], f"AdamW's place; write {ARGS}.fused=true"),
        ("torch.optim:LBFGS", [], "its step() raised TypeError: LBFGS.step() missing 1 required"),
        ("torch.optim:Muon", [], "Muon: Muon only supports 2D parameters"),
        ("user_optimizers:NoRate", [], f"{ARGS}.depth is missing: trainer.optimizer=user_optim"),
        ("user_optimizers:NoRate", [f"{ARGS}.depth=1"], "its defaults have no lr"),
        ("torch.optim:Rprop", ["trainer.weight_decay=1"], "its defaults have no weight_decay"),
        ("user_optimizers:Hidden", [], "resumed from its saved state it takes other steps"),
        ("user_optimizers:Random", [], "resumed from its saved state it takes other steps"),
        (
            "user_optimizers:Late",
            [],
            "its state late/layers.0.attention.wo.weight is not there aft",
        ),
        ("user_optimizers:Listed", [], "its state 'history' of tok_embeddings.weight is a list"),
        ("user_optimizers:Still", [], "it moved no weight in 4 steps; update them in step()"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_is_refused_with_the_reason(name, words, wrong):
    (line,) = problems_of(name, *words)
    assert line.startswith("trainer.") and wrong in line


def test_settings_of_an_optimizer_that_there_is_not_are_refused():
    (line,) = own_problems(conf_of(f"{ARGS}.momentum=0.9"))
    assert line.startswith(f"{ARGS}.momentum=0.9: AdamW's settings are keys of trainer")
    assert own_problems(conf_of("trainer.betas=[0, 0]")) == []


def test_sgd_takes_the_steps_of_torchs(solo_mesh):
    """Rate, settings, clipping off, and weight decay of matrices alone."""
    words = [SGD, f"{ARGS}.momentum=0.5", "trainer.weight_decay=0.1", "trainer.clip_norm=0",
             "trainer.weight_decay_on=matrices", "trainer.decay=linear", "steps=4"]  # fmt: skip
    trainer = trainer_of(conf_of(*words))
    weights = {n: w.detach().clone() for n, w in local_tensors(trainer.masters()).items()}
    matrices = [n for n, w in weights.items() if w.dim() > 1 and n != "tok_embeddings.weight"]
    groups = [
        {"params": [weights[n] for n in matrices], "weight_decay": 0.1},
        {"params": [w for n, w in weights.items() if n not in matrices]},
    ]
    reference = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for weight in weights.values():
            weight.grad = torch.empty_like(weight).normal_(generator=generator)
        for group in reference.param_groups:
            group["lr"] = 1e-3 * (1 - seed / 4)
        reference.step()
        advance(trainer, seed)
    for name, weight in local_tensors(trainer.masters()).items():
        assert torch.equal(weight, weights[name]), name


def test_the_same_rule_as_adamw_has_its_bits(solo_mesh):
    words = [f"{ARGS}.betas=[0.9,0.99]", "trainer.optimizer=torch.optim:AdamW"]
    own, ours = trainer_of(conf_of(*words)), trainer_of(conf_of())
    for seed in range(3):
        assert advance(own, seed) == advance(ours, seed)
    mine, theirs = (local_tensors(one.masters()) for one in (own, ours))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_step_without_signal_changes_nothing_of_its_own(solo_mesh):
    trainer = trainer_of(conf_of("trainer.optimizer=user_optimizers:SignMomentum"))
    advance(trainer, 1)
    before = trainer.optimizer.numbers()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert trainer.update(1.0, 0)["grad_norm"] == 0
    assert trainer.optimizer.numbers() == before and before["groups"][0]["taken"] == 1
