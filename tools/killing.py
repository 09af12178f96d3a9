"""A recipe under torchrun that is watched from outside and killed with kill -9 in a chosen phase.

The rank that is aimed at is stopped first (SIGSTOP), so that it is in its phase for certain when it
dies; where the phase was over already it goes on, and the next moment is tried.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measured_run import ROOT, children, rank_of
from phase_reporter import PHASES, WRITING, open_records

MARK = "MESH_CHAOS_JOB"  # an environment variable that all processes of a job inherit
GONE_SECONDS = 60.0  # by then all processes have ended after a kill; 30 on a machine of one's own
RUN_SECONDS = 900.0  # the longest that a small run may take on a busy machine
IDLE_SECONDS = 0.01  # between looks while nothing is near
ALL_OF = (*PHASES, WRITING)


@dataclass(frozen=True)
class Aim:
    """Where to kill: the phase, after how many steps of this start, at which part of the phase's
    usual duration; `victims`: "one rank", "all ranks" or "torchrun and all"."""

    phase: str
    victims: str
    after: int
    fraction: float


@dataclass(frozen=True)
class Struck:
    """What was killed: the rank that was aimed at, its phase as it stood still, its finished steps
    of this start, and the seconds until no process was left."""

    rank: int
    phase: str
    steps: int
    gone_seconds: float


class Job:
    """One start of a recipe. `log`: the file that takes what it prints."""

    def __init__(self, recipe: str, num_ranks: int, words: list[str], log: Path):
        self.log, self.num_ranks, self.token = log, num_ranks, uuid.uuid4().hex
        phases = log.with_suffix(".phases")
        self.records: np.ndarray = open_records(phases, num_ranks, new=True)
        here = Path(__file__).resolve().parent
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        program = (here / "phase_reporter.py", ROOT / "recipes" / recipe)
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

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit status, when no process of it is left."""
        self.popen.wait(timeout=RUN_SECONDS)
        self.wait_until_gone()
        return self.popen.returncode

    def strike(self, aim: Aim, usual: Mapping[str, float], dice: random.Random) -> Struck | None:
        """Kill as `aim` says; None where the run ended before it could be hit."""
        fraction, order = aim.fraction, dice.sample(range(self.num_ranks), self.num_ranks)
        pids = self._pids()
        while self.popen.poll() is None and len(pids) == self.num_ranks:
            seen = [rank for rank in order if self._is_there(rank, aim)]
            if not seen:
                near = self.records["phase"].any() and self._steps(order[0]) >= aim.after
                time.sleep(0 if near else IDLE_SECONDS)
                continue
            rank = seen[0]
            self._rest(fraction * usual[aim.phase])
            os.kill(pids[rank], signal.SIGSTOP)
            if wait_until_stopped(pids[rank]) and self._is_there(rank, aim):
                return self._kill(rank, aim, pids)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGCONT)
            fraction /= 2
            order = order[1:] + order[:1]
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
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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

    def _is_there(self, rank: int, aim: Aim) -> bool:
        if aim.phase == WRITING:
            there = bool(self.records[WRITING][rank])
        else:
            there = self._phase(rank) == aim.phase
        return there and self._steps(rank) >= aim.after

    def _phase(self, rank: int) -> str:
        return PHASES[self.records["phase"][rank]]

    def _steps(self, rank: int) -> int:
        return int(self.records["count"][rank][PHASES.index("sync")])

    def _rest(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        time.sleep(max(0.0, seconds - 0.002))  # it oversleeps
        while time.perf_counter() < until:
            pass

    def _kill(self, rank: int, aim: Aim, pids: list[int]) -> Struck:
        victims = {"one rank": [pids[rank]], "all ranks": pids}.get(
            aim.victims, [self.popen.pid, *pids]
        )
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        phase = WRITING if aim.phase == WRITING else self._phase(rank)
        return Struck(rank, phase, self._steps(rank), self.wait_until_gone())


def wait_until_stopped(pid: int) -> bool:
    """Until all threads of a process stand still; False where it ended."""
    while True:
        try:
            states = {
                stat.read_text().rpartition(")")[2].split()[0]
                for stat in Path(f"/proc/{pid}/task").glob("*/stat")
            }
        except OSError:
            return False
        if states <= {"T", "t"}:
            return bool(states)
        if states & {"Z", "X"}:
            return False
