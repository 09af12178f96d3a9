"""Host memory: how much is in use, and returning freed memory to the system.

glibc keeps the large buffers that a step frees in its heap. Steps are packed differently, so the
free pieces never fit quite, and the heap of a long run grows by what no longer fits.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

STATM = Path("/proc/self/statm")  # Linux
EVERY = 50  # steps; the next step touches its pages anew, which costs it about 10 % on a CPU


def trim(step: int) -> None:
    """Every so many steps, return what is free; no-op where the C library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if step % EVERY == 0 and malloc_trim is not None:
        malloc_trim(0)


def resident_gb() -> float | None:
    """Resident memory of this process [1e9 bytes]; None where the system does not say it."""
    if not STATM.exists():
        return None
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
