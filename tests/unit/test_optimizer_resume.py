"""What checkpoints carry of the optimizer beside AdamW's moments, in a world of one."""

from __future__ import annotations

import shutil

import pytest
import torch
import user_optimizers
from safetensors.torch import load_file
from test_checkpoint import (
    advance,
    advance_without_signal,
    bits_of,
    conf_of,
    loaded,
    run_with,
    trainer_of,
)
from test_rescue import begun, rescued

from mesh.checkpoint.files import read_index
from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.same_run import Inputs
from mesh.checkpoint.state import refuse_own
from mesh.config.keys import Refusal
from mesh.layout.holdings import local_tensors

SIGN = "trainer.optimizer=user_optimizers:SignMomentum"
OWN = [
    [SIGN, "ema=0.5", "trainer.weight_decay=0.1", "trainer.weight_decay_on=matrices"],
    ["trainer.optimizer=torch.optim:SGD", "trainer.optimizer_args.momentum=0.9"],
    ["trainer.optimizer=torch.optim:NAdam"],
]


@pytest.mark.parametrize("words", [["trainer.fused=true"], ["ema=0.9"], *OWN], ids=str)
def test_a_resumed_optimizer_takes_the_same_next_steps(process, tmp_path, words):
    conf, trainer = run_with(process, tmp_path / "run", 2, *words)
    _, other = loaded(process, tmp_path / "run", conf)
    for seed in (5, 6):
        assert advance(trainer, seed) == advance(other, seed)
        mine, theirs = bits_of(trainer), bits_of(other)
        assert mine.keys() == theirs.keys() and len(mine) > 40
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert trainer.optimizer.numbers() == other.optimizer.numbers()


def test_state_of_any_dtype_and_shape_is_in_the_checkpoint(process, tmp_path):
    run_with(process, tmp_path / "run", 2, SIGN)
    path = tmp_path / "run" / "checkpoints" / "step-2"
    stored = load_file(path / "rank-0.safetensors")
    name = "layers.0.feed_forward.w1.weight"
    kinds = {"momentum": (torch.bfloat16, (384, 128)), "largest": (torch.float32, (384, 1)),
             "count": (torch.int64, ())}  # fmt: skip
    for key, (dtype, shape) in kinds.items():
        tensor = stored[f"optimizer/{key}/{name}"]
        assert (tensor.dtype, tensor.shape) == (dtype, shape) and tensor.any()
    assert stored["optimizer/count/norm.weight"] == 4
    index = read_index(path)
    assert index.optimizer["weights"][name] == {"seen": 2}
    assert index.optimizer["weights"]["norm.weight"] == {"seen": 2, "largest": None}
    (group,) = index.optimizer["groups"]
    assert group == {"beta": 0.9, "weight_decay": 0.0, "taken": 2}


def test_an_optimizer_without_an_update_resumes_without_state(process, tmp_path):
    """Its only step was without signal."""
    conf, _ = run_with(process, tmp_path / "run", 1, SIGN)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    trainer = trainer_of(conf)
    keeper = Checkpointer(conf, tmp_path / "run", process, trainer, Inputs())
    advance_without_signal(trainer)
    keeper.after(1, stop=True)
    step, other = loaded(process, tmp_path / "run", conf)
    assert (step, other.updates, other.optimizer.numbers()) == (1, 0, {})
    for seed in (1, 2):
        advance(trainer, seed)
        advance(other, seed)
        mine, theirs = bits_of(trainer), bits_of(other)
        assert mine.keys() == theirs.keys() and any(name.startswith("optimizer/") for name in mine)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_fails_on_shards_is_refused_before_the_first_step(process):
    """torch's Adafactor runs on plain tensors only. The weights keep their bits."""
    faults = {
        "torch.optim:Adafactor": "its step() raised RuntimeError",
        "user_optimizers:Partial": "a DTensor of partial sums; call full_tensor",
    }
    for name, wrong in faults.items():
        trainer = trainer_of(conf_of(f"trainer.optimizer={name}"))
        before = {name: x.clone() for name, x in local_tensors(trainer.masters()).items()}
        with pytest.raises(Refusal, match=f"trainer.optimizer={name}: ") as refused:
            refuse_own(process, trainer)
        assert wrong in str(refused.value)
        after = local_tensors(trainer.masters())
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(weight.grad is None for weight in trainer.masters().values())
    trainer = trainer_of(conf_of(SIGN))
    refuse_own(process, trainer)
    assert trainer.optimizer.numbers() == {} and not trainer.optimizer.inner.state


def test_state_of_another_optimizer_is_refused(process, tmp_path, monkeypatch):
    """The user's code has changed since, which is a warning, and with it the state."""
    conf, _ = run_with(process, tmp_path / "run", 1, SIGN)

    class Other(user_optimizers.SignMomentum):
        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            for weight in self.param_groups[0]["params"]:
                self.state[weight]["more"] = torch.zeros_like(weight)

    monkeypatch.setattr(user_optimizers, "SignMomentum", Other)
    with pytest.raises(Refusal) as refused:
        loaded(process, tmp_path / "run", conf)
    said = str(refused.value)
    assert said.startswith(f"{SIGN}: its state more/layers.0.attention")
    assert said.endswith("step-1; restore the optimizer that wrote it, or start a new run")


def test_what_a_failed_run_saves_of_it(process, tmp_path):
    keeper, trainer = begun(process, tmp_path / "run", 2, SIGN)
    assert rescued(keeper) == f"resume={tmp_path / 'run'} continues after step 2"
    _, other = loaded(process, tmp_path / "run", keeper.conf)
    mine, theirs = bits_of(trainer), bits_of(other)
    assert mine.keys() == theirs.keys() and any(name.startswith("optimizer/") for name in mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert trainer.optimizer.numbers() == other.optimizer.numbers()


def test_the_average_is_in_the_checkpoint_and_not_the_weights(process, tmp_path):
    conf, trainer = run_with(process, tmp_path / "run", 2, "ema=0.9")
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "rank-0.safetensors")
    averages = {name: x for name, x in bits_of(trainer).items() if name.startswith("ema/")}
    assert len(averages) > 20 and averages.keys() <= stored.keys()
    for name, average in averages.items():
        assert torch.equal(stored[name], average)
        assert not torch.equal(average, stored[name.replace("ema/", "weights/")])
    index = read_index(tmp_path / "run" / "checkpoints" / "step-2")
    assert len({index.digests["ema"], index.digests["weights"]}) == 2


def test_the_average_of_a_run_that_fails_is_saved(process, tmp_path):
    keeper, trainer = begun(process, tmp_path / "run", 2, "ema=0.9")
    assert rescued(keeper) == f"resume={tmp_path / 'run'} continues after step 2"
    _, other = loaded(process, tmp_path / "run", keeper.conf)
    mine, theirs = bits_of(trainer), bits_of(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(name.startswith("ema/") for name in mine)
