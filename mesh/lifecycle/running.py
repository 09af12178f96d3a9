"""The phase that this process is in, for a display: one per process, as heartbeats are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_phase: tuple[str, float] | None = None


@contextmanager
def running(name: str) -> Iterator[None]:
    """Say that a phase runs; the one around it, if any, runs again afterwards."""
    global _phase
    before, _phase = _phase, (name, time.monotonic())
    try:
        yield
    finally:
        _phase = before


def running_phase() -> tuple[str, float] | None:
    """The phase that runs and its beginning on `time.monotonic` [s]; None between two phases."""
    return _phase
