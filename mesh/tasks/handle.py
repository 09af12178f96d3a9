"""The rank's handle of one process that calls a task's methods (`mesh/tasks/worker.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from mesh.tasks import TaskSpec
from mesh.tasks.scoring import MAX_DETAIL
from mesh.tasks.worker import HEADER, KILL, send

START_SECONDS = 300.0  # for importing a task
KILL_SECONDS = 10.0
SMALL = 1 << 15  # bytes queued
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from mesh.tasks.worker import main; main()"
)


@dataclass(frozen=True)
class Job:
    """A call of the task. key: the caller's; content: pickled (method, *arguments)."""

    key: Any
    method: str
    arguments: tuple[Any, ...]
    content: bytes = b""


class Worker:
    """One process, with its supervisor; it shares no torch, signals or files with us.

    num: it draws so many prompts of the first step (`drawn`), with hashes that are not ours.
    """

    def __init__(self, task: TaskSpec, num: int = 0):
        self.channel, channel = socket.socketpair()
        self.liveness, liveness = socket.socketpair()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115
        theirs = [channel.fileno(), liveness.fileno(), self.stacks.fileno()]
        paths = json.dumps([path for path in sys.path if isinstance(path, str)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT, paths, *map(str, theirs), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C goes to the rank
            env={**os.environ, "PYTHONHASHSEED": other_hash_seed()} if num else None,
        )
        channel.close()
        liveness.close()
        self.ready = self.hung_up = False
        self._liveness_poll = select.poll()
        self._liveness_poll.register(self.liveness, select.POLLIN)
        self.drawn: list[str] = []
        self.jobs: deque[Job] = deque()
        self._buffer = bytearray()
        spec = task.name, task.seed, dict(task.args), dict(task.scores), task.tokenizer
        self._send(pickle.dumps((*spec, num)), START_SECONDS)

    def takes(self, job: Job, depth: int) -> bool:
        """True if it can accept this job: as its only one, or as one of up to `depth` that fit into
        the socket while it works, so that sending does not block.
        """
        queued = sum(len(one.content) for one in list(self.jobs)[1:])
        fits = len(self.jobs) < depth and queued + len(job.content) < SMALL
        return self.ready and (not self.jobs or fits)

    def submit(self, job: Job, seconds: float) -> None:
        """Send a job that it `takes`."""
        self.jobs.append(job)
        self._send(job.content, seconds)

    def advance(self) -> Job:
        """Finish its current job and start the time limit of the next one."""
        self.deadline = time.monotonic() + self.seconds
        return self.jobs.popleft()

    def _send(self, content: bytes, seconds: float) -> None:
        if len(self.jobs) < 2:
            self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.channel.settimeout(seconds)
        with contextlib.suppress(OSError):  # it has ended; `liveness` reports how
            send(self.channel, content)
        self.channel.setblocking(False)

    def message(self) -> dict[str, Any] | None:
        """Its next answer, if that has arrived in full."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while part := self.channel.recv(1 << 16):
                self._buffer += part
            self.hung_up = True
        if len(self._buffer) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        content = bytes(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return dict(json.loads(content))

    def has_ended(self) -> bool:
        """True if it is gone; all that it answered before can then be read."""
        return bool(self._liveness_poll.poll(0))

    def end(self) -> tuple[int, str]:
        """(exit code as in `subprocess`, stack) of an ended process; a live one is killed first,
        with all that it has started.
        """
        with contextlib.suppress(OSError):
            self.liveness.sendall(KILL)
        return self._status(KILL_SECONDS), self._stack()

    def close(self, deadline: float) -> None:
        """Wait for it to end by itself, then kill it, with all that it has started."""
        self.liveness.settimeout(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            self.liveness.recv(16, socket.MSG_PEEK)
        self.end()

    def _status(self, seconds: float) -> int:
        self.channel.close()
        self.liveness.settimeout(seconds)
        status = b""
        with contextlib.suppress(OSError):
            status = self.liveness.recv(16)
        self.liveness.close()
        try:
            code = self.process.wait(1.0 if status else seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the supervisor; the child ends with it
            code = self.process.wait()
        return int(status) if status else code

    def _stack(self) -> str:
        with self.stacks:
            self.stacks.seek(0)
            return self.stacks.read(MAX_DETAIL).decode(errors="replace")


def other_hash_seed() -> str:
    """A fixed seed of Python's hashes that is not this process's."""
    return "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
