"""Stall detection: the heartbeats of all ranks, as each rank's guard sees them.

In lockstep one rank that stalls blocks all others in their next collective, where they look no less
alive than it does: so a run has stalled when no rank has recorded a heartbeat for `seconds`, and
the rank that went silent first is the one to look at. Every rank writes its count of heartbeats
into the rendezvous store and reads the others'.

A thread that holds the GIL for ever silences its own guard. The timer of `faulthandler` needs no
GIL: it is reset at every check, and prints the stacks when it expires. It does not end the process,
because it also expires when the process was suspended; the launcher ends it after the others.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

MAX_INTERVAL = 10.0  # seconds between two checks
GIL_SECONDS = 5.0  # from a stall to the stacks of a process whose guard is silenced
ABSENT = 5  # intervals without a check, after which this process must have been suspended itself
STDERR = 2
SHOWN = 8


@dataclass
class Sight:
    """The last heartbeat count seen of a rank, and since when it stands."""

    heartbeats: int
    since: float


class Watchdog:
    """One rank's view of the world. `seconds` 0: no stall is ever reported."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        seconds: float,
        heartbeats: Callable[[], int],
        now: float,
    ):
        self._rank, self._store, self._seconds, self._heartbeats = rank, store, seconds, heartbeats
        self._sights = {r: Sight(-1, now) for r in range(world_size)}
        self._interval = min(seconds / 10, MAX_INTERVAL)
        self._last, self._next = now, now

    def look(self, now: float) -> str | None:
        """The message for a world that has stalled. Call it often: it checks once per interval."""
        if not self._seconds or now < self._next:
            return None
        if now > self._last + ABSENT * self._interval:
            self._sights = {rank: Sight(-1, now) for rank in self._sights}
        self._last, self._next = now, now + self._interval
        faulthandler.dump_traceback_later(self._seconds + GIL_SECONDS, file=STDERR)
        self._store.set(f"heartbeats/{self._rank}", str(self._heartbeats()))
        for rank, sight in self._sights.items():
            if self._store.check([f"heartbeats/{rank}"]):
                count = int(self._store.get(f"heartbeats/{rank}"))
                if count != sight.heartbeats:
                    self._sights[rank] = Sight(count, now)
        quiet = {rank: now - sight.since for rank, sight in self._sights.items()}
        return self._describe(quiet) if min(quiet.values()) > self._seconds else None

    def close(self) -> None:
        """Cancel the timer."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _describe(self, quiet: dict[int, float]) -> str:
        longest = sorted(quiet, key=lambda rank: -quiet[rank])
        listed = ", ".join(f"rank {rank} for {quiet[rank]:.0f} s" for rank in longest[:SHOWN])
        more = f" and {len(quiet) - SHOWN} more" if len(quiet) > SHOWN else ""
        return (
            f"the run stalled: no rank recorded a heartbeat for stall_seconds={self._seconds:g}. "
            f"Silent, the longest first: {listed}{more}. The stacks of the ranks are above"
        )
