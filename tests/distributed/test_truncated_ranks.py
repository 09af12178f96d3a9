"""Truncated sets on two vocabulary shards: the draws and scores of one, to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from launching import launch


def test_two_vocabulary_shards_have_the_sets_of_one(tmp_path: Path):
    launch("tests/programs/truncated_program.py", 1, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for mine, whole in zip(found["sharded"], found["whole"], strict=True):
            assert all(map(torch.equal, mine["drawn"], whole["drawn"]))
            tokens, logprobs = whole["drawn"]
            assert len(set(tokens.tolist())) > 15, "control: tokens of both shards"
            same, kept, again, moved = mine["scores"]
            assert torch.equal(same[0], logprobs), "the engine's and the trainer's"
            assert all(map(torch.equal, kept, same)) and all(map(torch.equal, again, same))
            assert not torch.equal(moved[0], same[0])
            for ours, theirs in zip(mine["scores"], whole["scores"], strict=True):
                assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
                torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-5)
                assert torch.equal(ours[3], theirs[3].chunk(2)[rank])
