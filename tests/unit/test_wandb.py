"""Weights & Biases itself, offline: a run that is resumed goes on in the same W&B run."""

from __future__ import annotations

import json
import os

import pytest
from launching import Run

from mesh.recipes.grpo import main

KEY = "0123456789abcdef0123456789abcdef01234567"
WORDS = [
    "conf=qwen3_tiny", "num_prompts=2", "group_size=2", "eval.num_prompts=4", "eval.num_samples=1",
    "generator.max_new_tokens=4", "log.tensorboard=false", "log.wandb=a-project",
    "checkpoint.every=1",
]  # fmt: skip


def start(monkeypatch, *words: str) -> None:
    """The recipe, as the only process of a world that no launcher describes."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    main([*words])


def test_a_resumed_run_is_the_same_run_and_the_key_stays_out(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    path, other = tmp_path / "run", tmp_path / "other"
    start(monkeypatch, *WORDS, "steps=2", f"run_dir={path}")
    start(monkeypatch, f"resume={path}", "steps=3")
    start(monkeypatch, *WORDS, "steps=1", f"run_dir={other}")
    name, other_name = ((p / "wandb-id.txt").read_text().split()[0] for p in (path, other))
    assert len(name) == 8 and name != other_name
    files = sorted(path.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    entropies = [line["entropy"] for line in Run(path, "").metrics[1:]]
    held = [[json.dumps(e).encode() in file.read_bytes() for e in entropies] for file in files]
    assert held == [[True, True, False], [False, False, True]]

    out = "".join(capfd.readouterr())
    assert "done  3/3 steps" in out and KEY not in out
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 20 and not any(KEY.encode() in file.read_bytes() for file in written)
