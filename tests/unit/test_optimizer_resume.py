"""What checkpoints carry of the optimizer beside AdamW's moments, in a world of one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import advance, bits_of, loaded, run_with
from test_rescue import begun, rescued

from mesh.checkpoint.files import read_index


@pytest.mark.parametrize("words", [["trainer.fused=true"], ["ema=0.9"]], ids=str)
def test_a_resumed_optimizer_takes_the_same_next_steps(process, tmp_path, words):
    conf, trainer = run_with(process, tmp_path / "run", 2, *words)
    _, other = loaded(process, tmp_path / "run", conf)
    for seed in (5, 6):
        assert advance(trainer, seed) == advance(other, seed)
        mine, theirs = bits_of(trainer), bits_of(other)
        assert mine.keys() == theirs.keys() and len(mine) > 60
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


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
