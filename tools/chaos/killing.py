"""A recipe under torchrun that is watched from outside and killed with kill -9 in a chosen phase.

The rank that is aimed at stands still (SIGSTOP, see phase_reporter.py) when it is looked at: so it
is in its phase for certain when it dies. Where the phase was over already it goes on, and the next
time is tried, earlier in the phase.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools import ROOT
from tools.chaos.phase_reporter import (
    ALL_OF,
    STARTUP,
    WRITING,
    finished_steps,
    open_records,
)
from tools.processes import children, rank_of, send, states_of

MARK = "MESH_CHAOS_JOB"  # an environment variable that all processes of a job inherit
GONE_SECONDS = 60.0  # by then all processes have ended after a kill; 30 on a machine of one's own
RUN_SECONDS = 900.0  # the longest that a small run may take on a busy machine
IDLE_SECONDS = 0.01  # between looks


@dataclass(frozen=True)
class Aim:
    """Where to kill: the phase, after how many steps of this start and how many times of coming
    into it then, at which part of its usual duration. `victims`: "one rank", "all ranks" or
    "torchrun and all"; draw: of the ranks that do something there, which one, from 0 to 1."""

    phase: str
    victims: str
    after: int
    skip: int
    fraction: float
    draw: float


@dataclass(frozen=True)
class Struck:
    """What was killed: the rank that was aimed at, its phase as it stood still, its finished steps
    of this start, and the seconds until no process was left."""

    rank: int
    phase: str
    steps: int
    gone_seconds: float


class Job:
    """One start of a recipe. `log`: the file that takes what it prints. As a context manager it
    leaves no process behind."""

    def __init__(self, recipe: str, num_ranks: int, words: list[str], log: Path):
        self.log, self.num_ranks, self.token = log, num_ranks, uuid.uuid4().hex
        phases = log.with_suffix(".phases")
        self.records: np.ndarray = open_records(phases, num_ranks, new=True)
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        program = (ROOT / "tools/chaos/phase_reporter.py", ROOT / "recipes" / recipe)
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        job = {
            MARK: self.token,
            "PHASE_FILE": str(phases),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [*launcher, f"--nproc-per-node={num_ranks}", *map(str, program), *words],
                env=os.environ | job,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.began = time.monotonic()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit status, when no process of it is left."""
        self.popen.wait(timeout=RUN_SECONDS)
        self.wait_until_gone()
        return self.popen.returncode

    def strike(self, aim: Aim, usual: Mapping[str, float], rank: int) -> Struck | None:
        """Kill as `aim` says, where `rank` is; None where the run ended before it could be hit."""
        pids, fraction = self._pids(), aim.fraction
        while self.popen.poll() is None and len(pids) == self.num_ranks:
            delay = fraction * usual[aim.phase]
            if aim.phase == STARTUP:
                time.sleep(max(0.0, self.began + delay - time.monotonic()))
                send(pids[rank], signal.SIGSTOP)
            else:
                self._ask_to_stop(rank, aim, delay)
            if not self._stands_still(pids[rank]):
                return None
            if self._phase(rank, aim) == aim.phase:
                return self._kill(rank, aim, pids)
            send(pids[rank], signal.SIGCONT)
            fraction = fraction / 3 if fraction == aim.fraction else 0.0  # 0 is met for certain
            if aim.phase == STARTUP:
                return None
        return None

    def started_seconds(self) -> float:
        """Wait until every rank has left its start-up; how long that took."""
        while self.popen.poll() is None and not self.records["phase"].all():
            time.sleep(IDLE_SECONDS)
        return time.monotonic() - self.began

    def usual(self) -> dict[str, float]:
        """Seconds that each phase took, the slowest rank's mean."""
        counts, seconds = self.records["count"], self.records["seconds"]
        means = (seconds / np.maximum(counts, 1)).max(axis=0)
        return dict(zip(ALL_OF, means.tolist(), strict=True))

    def survivors(self) -> list[int]:
        """Processes of this job that still run, whoever is their parent by now."""
        mark = f"{MARK}={self.token}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def wait_until_gone(self) -> float:
        """Seconds until no process is left; RuntimeError, after killing them, where some stay."""
        began = time.monotonic()
        while self.popen.poll() is None or self.survivors():
            if time.monotonic() > began + GONE_SECONDS:
                left = self.survivors()
                self.end()
                raise RuntimeError(f"processes {left} still ran {GONE_SECONDS:.0f} s after the end")
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self) -> None:
        """Kill what is left of it."""
        for pid in self.survivors():
            send(pid, signal.SIGKILL)
        self.popen.wait()

    def _pids(self) -> list[int]:
        """Process ids of the ranks, when torchrun has started all of them."""
        by_rank: dict[int, int] = {}
        while len(by_rank) < self.num_ranks and self.popen.poll() is None:
            time.sleep(IDLE_SECONDS)
            with contextlib.suppress(OSError):
                ranks = {pid: rank_of(pid) for pid in children(self.popen.pid)}
                by_rank = {rank: pid for pid, rank in ranks.items() if rank is not None}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def _ask_to_stop(self, rank: int, aim: Aim, delay: float) -> None:
        record = self.records[rank]
        record["stop_delay"], record["stop_after"] = delay, aim.after
        record["stop_skip"] = aim.skip
        record["stop_in"] = 1 + ALL_OF.index(aim.phase)  # last: from here on it obeys

    def _stands_still(self, pid: int) -> bool:
        """Wait until all threads of a process are stopped; False where it ended."""
        while self.popen.poll() is None:
            states = states_of(pid)
            if states.get(pid, "X") in "ZX":
                return False
            if set(states.values()) <= {"T", "t"}:
                return True
            time.sleep(IDLE_SECONDS)
        return False

    def _phase(self, rank: int, aim: Aim) -> str:
        """Where a rank is; its writing thread counts where that is aimed at."""
        record = self.records[rank]
        return WRITING if aim.phase == WRITING and record[WRITING] else ALL_OF[record["phase"]]

    def _kill(self, rank: int, aim: Aim, pids: list[int]) -> Struck:
        victims = {"one rank": [pids[rank]], "all ranks": pids}.get(
            aim.victims, [self.popen.pid, *pids]
        )
        for pid in victims:
            send(pid, signal.SIGKILL)
        steps = finished_steps(self.records[rank])
        return Struck(rank, self._phase(rank, aim), steps, self.wait_until_gone())
