"""Observe processes from outside (Linux): children, ranks, memory, states; send signals."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def children(parent: int) -> list[int]:
    """Process ids of the direct children of a process."""
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    try:
        return [int(pid) for task in tasks for pid in task.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def rank_of(pid: int) -> int | None:
    """The RANK that torchrun gave a process; None for its other children."""
    for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if variable.startswith(b"RANK="):
            return int(variable.removeprefix(b"RANK="))
    return None


def peak_rss(pid: int) -> int:
    """Peak resident memory of a process [bytes]; 0 if it has just ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far [s], without that of its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def states_of(pid: int) -> dict[int, str]:
    """States of a process's threads by thread id, as in proc(5); the main thread has the id `pid`.
    Empty if the process is gone."""
    states = {}
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            states[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()[0]
    return states


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, which may have ended by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
