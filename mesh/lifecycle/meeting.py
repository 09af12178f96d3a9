"""Words that all ranks exchange through the rendezvous store while a collective of their main
threads is blocked for ever: what a failed run still has to agree on before it ends.

Each rank answers a question once. Nothing here waits for a rank that has ended, for one that does
not answer in time, or on after a signal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

POLL_SECONDS = 0.05


class Interrupted(RuntimeError):
    """A signal asks the process to end at once."""


class Meeting:
    """One rank's side. `gone`: true of a rank that has ended or left; `signalled`: waits so many
    seconds, true where a signal arrives meanwhile."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        gone: Callable[[int], bool],
        signalled: Callable[[float], bool],
    ):
        self.rank, self.world_size = rank, world_size
        self._store, self._gone, self._signalled = store, gone, signalled

    def tell(self, question: str, mine: Any) -> None:
        """Give this rank's answer, small JSON."""
        self._store.set(f"{question}/{self.rank}", json.dumps(mine))

    def answer(self, question: str, rank: int, seconds: float) -> Any | None:
        """What one rank answers within so many seconds; None where it does not."""
        key = f"{question}/{rank}"
        if not self.until(lambda: self._store.check([key]), seconds, lambda: self._gone(rank)):
            return None
        return json.loads(self._store.get(key))

    def answers(self, question: str, mine: Any, seconds: float) -> list[Any]:
        """Every rank's answer, by rank; None of those that do not answer within so many seconds."""
        self.tell(question, mine)
        deadline = time.monotonic() + seconds
        return [
            self.answer(question, rank, deadline - time.monotonic())
            for rank in range(self.world_size)
        ]

    def decide(self, question: str, proposal: Any) -> Any:
        """The first proposal of any rank, which all ranks get: ranks may have heard different
        answers in time."""
        text = json.dumps(proposal)
        return json.loads(self._store.compare_set(f"{question}/decided", "", text))

    def until(
        self,
        done: Callable[[], bool],
        seconds: float,
        hopeless: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Wait for `done`, no longer than this; False where that is in vain. Raises Interrupted
        after a signal."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline or (hopeless() and not done()):
                return False
            if self._signalled(POLL_SECONDS):
                raise Interrupted("a signal ended the run at once")
        return True
