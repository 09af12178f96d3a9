"""A model directory with one kv head, which tensor-parallel ranks have to share."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from mesh.model.families import TINY, config_entries
from mesh.text.tokenizer import CHARACTERS


def one_kv_head(path: Path, **changes: Any) -> list[str]:
    """Write the directory, without weights; returns the words of a run that trains it from random
    ones. Its rewards seldom agree, so that every step changes the weights. changes: of the tiny
    shape, beside the number of kv heads."""
    shutil.copytree(CHARACTERS, path)
    entries = config_entries(replace(TINY, num_kv_heads=1, **changes), (1,))
    (path / "config.json").write_text(json.dumps(entries))
    task = ["task=user_tasks:Foreseen", "reward.workers=0"]
    return [f"model.path={path}", "model.init=random", *task]
