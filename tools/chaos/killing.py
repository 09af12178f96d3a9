"""A recipe under torchrun that is killed with kill -9 in a chosen phase.

The rank to kill is stopped first (SIGSTOP, see phase_reporter.py), so it is certain to be in its
phase when it dies. If the phase was already over it continues, and the next occurrence is tried,
earlier in the phase.
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

MARK = "MESH_CHAOS_JOB"  # environment variable that all processes of a job inherit
GONE_SECONDS = 60.0  # limit for all processes to end after a kill; 30 suffice on an idle machine
RUN_SECONDS = 900.0  # limit for a small run on a busy machine
IDLE_SECONDS = 0.01  # between two polls


@dataclass(frozen=True)
class KillPoint:
    """When and whom to kill: in `phase`, not before `after` steps of this start, at occurrence
    `skip` + 1 after those, at `fraction` of the phase's typical duration. `victims`: "one rank",
    "all ranks" or "torchrun and all". `draw`: from 0 to 1, chooses among the ranks that do
    something in the phase."""

    phase: str
    victims: str
    after: int
    skip: int
    fraction: float
    draw: float


@dataclass(frozen=True)
class Kill:
    """A kill: the rank, its phase when it was stopped, its finished steps of this start, and the
    seconds until no process was left."""

    rank: int
    phase: str
    steps: int
    gone_seconds: float


class Job:
    """One start of a recipe; its output goes to the file `log`. As a context manager it leaves no
    process behind."""

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
        """Everything it has printed."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Wait until none of its processes is left; its exit status."""
        self.popen.wait(timeout=RUN_SECONDS)
        self.wait_until_gone()
        return self.popen.returncode

    def kill_at(self, point: KillPoint, durations: Mapping[str, float], rank: int) -> Kill | None:
        """Kill `rank` at `point`; None where the run ended before that."""
        pids, fraction = self._pids(), point.fraction
        while self.popen.poll() is None and len(pids) == self.num_ranks:
            delay = fraction * durations[point.phase]
            if point.phase == STARTUP:
                time.sleep(max(0.0, self.began + delay - time.monotonic()))
                send(pids[rank], signal.SIGSTOP)
            else:
                self._ask_to_stop(rank, point, delay)
            if not self._is_stopped(pids[rank]):
                return None
            if self._phase(rank, point) == point.phase:
                return self._kill(rank, point, pids)
            send(pids[rank], signal.SIGCONT)
            fraction = fraction / 3 if fraction == point.fraction else 0.0  # 0 cannot be missed
            if point.phase == STARTUP:
                return None
        return None

    def started_seconds(self) -> float:
        """Wait until every rank has finished its start-up; the seconds since the launch."""
        while self.popen.poll() is None and not self.records["phase"].all():
            time.sleep(IDLE_SECONDS)
        return time.monotonic() - self.began

    def durations(self) -> dict[str, float]:
        """Mean seconds of each phase on the slowest rank."""
        counts, seconds = self.records["count"], self.records["seconds"]
        means = (seconds / np.maximum(counts, 1)).max(axis=0)
        return dict(zip(ALL_OF, means.tolist(), strict=True))

    def survivors(self) -> list[int]:
        """Running processes of this job, whoever their parent is by now."""
        mark = f"{MARK}={self.token}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def wait_until_gone(self) -> float:
        """Seconds until no process is left. Raises RuntimeError, after killing them, where some
        survive GONE_SECONDS."""
        began = time.monotonic()
        while self.popen.poll() is None or self.survivors():
            if time.monotonic() > began + GONE_SECONDS:
                left = self.survivors()
                self.end()
                raise RuntimeError(f"processes {left} still ran {GONE_SECONDS:.0f} s after the end")
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self) -> None:
        """Kill the processes that are left."""
        for pid in self.survivors():
            send(pid, signal.SIGKILL)
        self.popen.wait()

    def _pids(self) -> list[int]:
        """Process ids of the ranks, once torchrun has started all of them."""
        by_rank: dict[int, int] = {}
        while len(by_rank) < self.num_ranks and self.popen.poll() is None:
            time.sleep(IDLE_SECONDS)
            with contextlib.suppress(OSError):
                ranks = {pid: rank_of(pid) for pid in children(self.popen.pid)}
                by_rank = {rank: pid for pid, rank in ranks.items() if rank is not None}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def _ask_to_stop(self, rank: int, point: KillPoint, delay: float) -> None:
        record = self.records[rank]
        record["stop_delay"], record["stop_after"] = delay, point.after
        record["stop_skip"] = point.skip
        record["stop_in"] = 1 + ALL_OF.index(point.phase)  # last: this one arms the stop

    def _is_stopped(self, pid: int) -> bool:
        """Wait until all threads of a process are stopped; False if it ended instead."""
        while self.popen.poll() is None:
            states = states_of(pid)
            if states.get(pid, "X") in "ZX":
                return False
            if set(states.values()) <= {"T", "t"}:
                return True
            time.sleep(IDLE_SECONDS)
        return False

    def _phase(self, rank: int, point: KillPoint) -> str:
        """The phase of a rank; its writing thread counts if that is to be killed."""
        record = self.records[rank]
        return WRITING if point.phase == WRITING and record[WRITING] else ALL_OF[record["phase"]]

    def _kill(self, rank: int, point: KillPoint, pids: list[int]) -> Kill:
        victims = {"one rank": [pids[rank]], "all ranks": pids}.get(
            point.victims, [self.popen.pid, *pids]
        )
        for pid in victims:
            send(pid, signal.SIGKILL)
        steps = finished_steps(self.records[rank])
        return Kill(rank, self._phase(rank, point), steps, self.wait_until_gone())
