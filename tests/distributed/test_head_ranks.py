"""Entropies, divergences and their gradients over a vocabulary that two ranks share."""

from __future__ import annotations

from pathlib import Path

import torch
from launching import launch
from programs.head_program import TEXTLESS


def test_a_shared_vocabulary_has_the_scores_and_gradients_of_the_whole(tmp_path: Path):
    """Scores to the bit, and so is the gradient of a weight, which one rank has alone."""
    launch("tests/programs/head_program.py", 1, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for size in TEXTLESS:
        whole, shards = ranks[0][size]["whole"], [seen[size]["sharded"] for seen in ranks]
        for name in ("logprobs_A", "entropy_A", "divergence_A"):
            assert all(torch.equal(shard[name], whole[name]) for shard in shards), name
        weight = torch.cat([shard["weight"] for shard in shards])
        assert torch.equal(weight, whole["weight"]) and weight.abs().max() > 0.1
        for shard in shards:
            torch.testing.assert_close(shard["hidden"], whole["hidden"], rtol=1e-5, atol=1e-5)
