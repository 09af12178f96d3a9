"""Secrets leave no page, whether it hides names or not: `(not shown)` stands for them.

The configuration is read by key (settings.py). What else a run says of itself is free text: its
command line, messages, profiles. Rollouts are what a model and a data set say, and stay.
"""

from __future__ import annotations

from typing import Any

from mesh.config.secrets import without_secrets

OF_THE_RUN = ("environment", "missing", "profiles", "headline", "findings", "comparison")
OURS = ("help", "key", "label", "title", "try", "promise")


def scrubbed(data: dict[str, Any]) -> dict[str, Any]:
    """The data of a page without secrets in what runs say of themselves."""
    runs = [_scrubbed_parts(run) for run in data["runs"]]
    return _scrubbed_parts(data) | {"runs": runs}


def _scrubbed_parts(part: dict[str, Any]) -> dict[str, Any]:
    return part | {name: _scrubbed(part[name]) for name in OF_THE_RUN if name in part}


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, list):
        return [_scrubbed(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: item if name in OURS else _scrubbed(item) for name, item in value.items()}
