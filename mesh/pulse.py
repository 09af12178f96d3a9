"""Signs of life: whatever may take long counts a beat each time that it has got on a little.

`mesh/watchdog.py` compares the counts of all ranks over time. One counter a process, so that the
engine, the trainer and the readers of files need not be handed one.
"""

from __future__ import annotations

_count = 0


def beat() -> None:
    """This process has got on. Cheap enough for every decode step."""
    global _count
    _count += 1


def beats() -> int:
    """How often it has."""
    return _count
