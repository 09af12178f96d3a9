"""Returning freed host memory to the system.

glibc keeps the large buffers that a step frees in its heap. Steps are packed differently, so the
free pieces never fit quite, and the heap of a long run grows by what no longer fits.
"""

from __future__ import annotations

import ctypes

EVERY = 50  # steps; the next step touches its pages anew, which costs it about 10 % on a CPU


def trim(step: int) -> None:
    """Every so many steps, return what is free; no-op where the C library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if step % EVERY == 0 and malloc_trim is not None:
        malloc_trim(0)
