"""Validation runs of the families that have no other whole run: L0 to L3 on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Run, runs
from tiny_families import RUNNING
from tiny_qwen3 import save_checkpoint

WORDS = [
    "conf=qwen3_tiny", "model.tokenizer=package:characters", "model.max_length=64",
    "num_prompts=4", "group_size=4", "generator.max_new_tokens=8", "validate.sequences=9",
    "validate.steps=1", "log.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def validated(tmp_path_factory) -> dict[str, Run]:
    """A validation run of each family, in one launch."""
    root = tmp_path_factory.mktemp("families")
    asked = {}
    for family, variant in RUNNING.items():
        directory = root / "models" / family
        save_checkpoint(directory, variant)
        words = [*WORDS, f"model.path={directory}", f"run_dir={root / family / 'run'}"]
        asked[family] = ("validate", words)
    return runs(root, 2, asked)


@pytest.mark.parametrize("family", RUNNING)
def test_the_ladder_holds_for_the_family(validated, family):
    report = json.loads(Path(validated[family].path / "validation.json").read_text())
    checks = report["checks"]
    assert report["passed"] is True
    # responses are short: no sequence outgrows the pages of its prompt
    skipped = [check["what"] for check in checks if check["result"] != "pass"]
    assert skipped == ["generator, sequences preempted"]
    assert {check["rung"] for check in checks} == {"L0", "L1", "L2", "L3"}
    layouts = {check["what"] for check in checks if check["rung"] == "L3"}
    for role in ("trainer dp 1x1 tp 2,", "tp 2 sp,", "generator dp 1 tp 2", "split 1+1"):
        assert any(role in layout for layout in layouts), layouts
    assert sum(check["tally"]["compared"] for check in checks if check["tally"]) > 3000
