"""The other ranks as one rank sees them without a process group: through the rendezvous store and,
on its own machine, through the process table. `guard.py` ends a process by what it learns here.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch.distributed as dist

from mesh.lifecycle.ending import Failure, alive, place, under_torchrun

POLL_SECONDS = 0.05


class Peers:
    """All ranks but this one. `local_ranks`: those that the launcher started on this machine."""

    def __init__(self, rank: int, world_size: int, local_ranks: Iterable[int], store: dist.Store):
        self.rank, self.world_size = rank, world_size
        self.others = [r for r in range(world_size) if r != rank]
        self._store = store
        self._local_pids = self._exchange_pids([r for r in local_ranks if r != rank])

    def announce(self, state: str) -> None:
        """Tell the others that this rank has left or gone mute."""
        with contextlib.suppress(dist.DistError):
            self._store.set(f"out/{self.rank}", state)

    def wait(self, seconds: float) -> None:
        """Until every living peer has left or gone mute, but no longer than this."""
        missing = list(self.others)

        def any_missing() -> bool:
            while missing and self.gone(missing[-1]):
                missing.pop()
            return bool(missing)

        with contextlib.suppress(dist.DistError):
            wait_while(any_missing, seconds)

    def wait_until_local_ones_ended(self, seconds: float) -> None:
        """Until no other rank of this machine runs, but no longer than this."""
        wait_while(lambda: any(map(alive, self._local_pids.values())), seconds)

    def fails_for_this_machine(self, reporter: int) -> bool:
        """Whether this rank's exit status tells the launcher of this machine of a refusal that
        `reporter` prints. torchrun has a paragraph for each rank that fails, so one is enough."""
        here = [self.rank, *self._local_pids]
        return not under_torchrun() or self.rank == (reporter if reporter in here else min(here))

    def lost(self) -> Failure | None:
        """A failure record for a local peer that ended without a word."""
        for peer, pid in self._local_pids.items():
            if not alive(pid) and not self._store.check([f"out/{peer}"]):
                text = f"rank {peer} (process {pid}) was killed, or crashed outside Python"
                return Failure(peer, self.rank, text, text)
        return None

    def _exchange_pids(self, local_peers: list[int]) -> dict[int, int]:
        """Process ids of the peers that this process can see."""
        self._store.set(f"pid/{self.rank}", f"{place()} {os.getpid()}")
        answers = {r: self._store.get(f"pid/{r}").decode().rsplit(" ", 1) for r in local_peers}
        return {r: int(pid) for r, (where, pid) in answers.items() if where == place()}

    def gone(self, peer: int) -> bool:
        """True where a rank has left or gone mute, or has died on this machine."""
        dead = peer in self._local_pids and not alive(self._local_pids[peer])
        return dead or self._store.check([f"out/{peer}"])


def wait_while(condition: Callable[[], bool], seconds: float) -> None:
    """Sleep while `condition` holds, but no longer than this."""
    deadline = time.monotonic() + seconds
    while condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def open_store() -> dist.Store:
    """A client of our own to the launcher's store: one client cannot serve two threads."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
