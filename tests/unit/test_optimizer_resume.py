"""What checkpoints carry of the optimizer beside AdamW's moments, in a world of one."""

from __future__ import annotations

import torch
from test_checkpoint import advance, bits_of, loaded, run_with


def test_a_fused_update_resumes_to_the_bit(process, tmp_path):
    conf, trainer = run_with(process, tmp_path / "run", 2, "trainer.fused=true")
    _, other = loaded(process, tmp_path / "run", conf)
    for seed in (5, 6):
        assert advance(trainer, seed) == advance(other, seed)
        mine, theirs = bits_of(trainer), bits_of(other)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
