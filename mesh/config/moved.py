"""Keys of earlier versions. Every saved configuration has them, since it holds every key."""

from __future__ import annotations

from typing import Any

from mesh.config.keys import problem, shown

MOVED = {"sft.decay": ("none", "trainer.decay")}
"""(default, the key that took its place) of each."""


def moved_problem(name: str, value: Any, source: str) -> str | None:
    """The problem with a key that has moved; None for its default in a file, which says nothing."""
    default, now = MOVED[name]
    if source and shown(value) == default:
        return None
    return problem(name, value, "this key has moved", f"write {now}={shown(value)}")
