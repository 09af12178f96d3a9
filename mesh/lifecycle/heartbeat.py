"""Heartbeats: code that may run for long records one each time it makes progress.

`watchdog.py` compares the counts of all ranks over time. There is one counter per process, so that
the engine, the trainer and the readers of files need not be handed one.
"""

from __future__ import annotations

_count = 0


def heartbeat() -> None:
    """Record a heartbeat: this process makes progress. Cheap enough for every decode step."""
    global _count
    _count += 1


def heartbeats() -> int:
    """Number of heartbeats recorded by this process."""
    return _count
