"""Whether the terminal is still a live display's: one answer per process.

A display draws over its own last rows. Once the run is asked to end, other processes write there
too, and the guard of this one may end it at any moment. So the guard says when drawing is over, and
a display asks before it draws. Neither waits for the other.
"""

from __future__ import annotations

import threading

_left = threading.Event()


def leave_terminal() -> None:
    """Let nothing be redrawn from now on."""
    _left.set()


def take_terminal() -> None:
    """Let a display draw."""
    _left.clear()


def terminal_left() -> bool:
    """True where nothing is to be redrawn."""
    return _left.is_set()
