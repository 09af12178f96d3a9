"""How a key of the schema is declared: its default, its meaning and its range."""

from __future__ import annotations

from dataclasses import field
from typing import Any

INF = float("inf")


def key(default: Any, meaning: str, **bounds: float) -> Any:
    """A configuration key: its default, the one line that `--help` prints, and its range.

    `bounds` are any of `ge`, `gt`, `le`, `lt` (pydantic's words); they hold for each element of a
    tuple, and None is always inside.
    """
    metadata = {"help": meaning, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
