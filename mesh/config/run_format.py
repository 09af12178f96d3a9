"""Format version of a run directory, checked before anything else is read from it.

Every start of a run records it as `format` in its `environment*.json`; runs older than the entry
have version 1. Checkpoints have a version of their own (`mesh/checkpoint/files.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mesh.config.keys import problem

RUN_FORMAT = 1
"""Version that this code reads and writes; raise it with every incompatible change of layout."""


def run_format_problems(run_dir: str) -> list[str]:
    """A run directory written in another format than this code reads."""
    for file in sorted(Path(run_dir).expanduser().glob("environment*.json")):
        version = _format_of(file)
        if version not in (None, RUN_FORMAT):
            wrong = f"has run format {version}, this version of mesh reads {RUN_FORMAT}"
            remedy = "use the version that wrote it, or start a new run"
            return [problem("resume", run_dir, wrong, remedy)]
    return []


def _format_of(file: Path) -> Any:
    """The version in one file; None for a link, or a file that a killed start left truncated."""
    if file.is_symlink():
        return None  # refused by `run_dir_problems`
    try:
        environment = json.loads(file.read_text())
    except ValueError:
        return None
    return environment.get("format", 1) if isinstance(environment, dict) else None
