"""The rank's side of the scoring processes (`mesh/tasks/worker.py`): jobs out, outcomes in.

One thread serves all of them. A process has a time limit for its current job, and the next job
queued: sending it only after the answer would double the cost of a quick score. A process that
hangs or ends is replaced when there is work for another one; the job it was scoring becomes a
problem, not an error: the caller decides what to do about it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from mesh.tasks.response import Score
from mesh.tasks.scoring import MAX_DETAIL, Outcome
from mesh.tasks.worker import HEADER, KILL, send

START_SECONDS = 300.0  # for importing a task
CLOSE_SECONDS = 5.0  # for the atexit handlers of user code
KILL_SECONDS = 10.0
SMALL = 1 << 15  # bytes
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from mesh.tasks.worker import main; main()"
)


class Worker:
    """One scoring process, with its supervisor; it shares no torch, signals or files with us.

    num: it draws so many prompts of the first step (`drawn`), with hashes that are not ours.
    """

    def __init__(self, name: str, seed: int, args: dict[str, Any], num: int = 0):
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
        self.jobs: deque[int] = deque()
        self._buffer = bytearray()
        self._send(pickle.dumps((name, seed, args, num)), START_SECONDS)

    def takes(self, content: bytes) -> bool:
        """True if it can accept this job: as its only one, or as a second one that fits into the
        socket while it works, so that sending does not block.
        """
        return self.ready and (not self.jobs or len(self.jobs) < 2 and len(content) < SMALL)

    def submit(self, job: int, content: bytes, seconds: float) -> None:
        """Send a job that it `takes`."""
        self.jobs.append(job)
        self._send(content, seconds)

    def advance(self) -> None:
        """Finish its current job and start the time limit of the next one."""
        self.jobs.popleft()
        self.deadline = time.monotonic() + self.seconds

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


class Pool:
    """Up to `num_workers` processes for one task, started on demand."""

    def __init__(self, name: str, seed: int, args: dict[str, Any], num_workers: int):
        self.task = (name, seed, args)
        self.num_workers = num_workers
        self.workers: list[Worker] = []

    def outcomes(
        self, jobs: Sequence[bytes], seconds: float
    ) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (index, outcome) of every job as it finishes, within `seconds` each.

        Raises ValueError if a process cannot create the task. Kills busy processes if the caller
        stops early.
        """
        waiting, left = deque(range(len(jobs))), len(jobs)
        try:
            while left:
                self._drop_ended()
                while len(self.workers) < min(self.num_workers, left):
                    self.workers.append(Worker(*self.task))
                for num in (0, 1):
                    for worker in self.workers:
                        if waiting and worker.takes(jobs[waiting[0]]) and len(worker.jobs) == num:
                            index = waiting.popleft()
                            worker.submit(index, jobs[index], seconds)
                for worker in self._active():
                    while (found := self._collect(worker)) is not None:
                        left -= 1
                        yield found
                    if worker not in self.workers:
                        waiting.extendleft(reversed(worker.jobs))
        finally:
            for worker in [worker for worker in self.workers if worker.jobs]:
                self._drop(worker)

    def start(self, num: int = 0) -> list[str]:
        """Wait until one process has created the task; texts of `num` prompts of the first step, as
        it draws them. Raises ValueError if it cannot create it.
        """
        if not self.workers:
            self.workers.append(Worker(*self.task, num))
        while not self.workers[0].ready:
            for worker in self._active():
                self._collect(worker)
        return self.workers[0].drawn

    def close(self) -> None:
        """End all processes."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self.workers:
            worker.channel.close()
        while self.workers:
            self.workers.pop().close(deadline)

    def _drop_ended(self) -> None:
        """Drop idle workers that have ended."""
        for worker in [w for w in self.workers if w.ready and not w.jobs and w.has_ended()]:
            self._drop(worker)

    def _active(self) -> list[Worker]:
        """Wait for workers with something to read, or past their deadline."""
        expected = [w for w in self.workers if w.jobs or not w.ready]
        poll, by_file = select.poll(), {}
        for worker in expected:
            sockets = (worker.liveness,) if worker.hung_up else (worker.liveness, worker.channel)
            for side in sockets:
                poll.register(side, select.POLLIN)
                by_file[side.fileno()] = worker
        first = min(worker.deadline for worker in expected)
        events = poll.poll(max(0, math.ceil(1000 * (first - time.monotonic()))))
        readable, now = [by_file[file] for file, _ in events], time.monotonic()
        return [worker for worker in expected if worker in readable or now > worker.deadline]

    def _collect(self, worker: Worker) -> tuple[int, Outcome] | None:
        """Outcome of its job, if finished. Raises ValueError if it cannot create the task."""
        if worker not in self.workers or (worker.ready and not worker.jobs):
            return None
        ended, late = worker.has_ended(), time.monotonic() > worker.deadline
        message = worker.message()
        if message is None and not ended and not late:
            return None
        if message is None:
            message = self._failure(worker, hung=not ended)
        if worker.ready:
            job = worker.jobs[0]
            worker.advance()
            score = Score(*message.pop("score", (0.0,)))
            return job, Outcome(score, **message)
        if message["problem"]:
            self._drop(worker)
            raise ValueError(_refusal(self.task[0], message))
        worker.ready, worker.drawn = True, message["drawn"]
        return None

    def _failure(self, worker: Worker, hung: bool) -> dict[str, Any]:
        """Kill a process that hung or ended during a job, and answer in its place."""
        code, stack = self._drop(worker)
        if hung:
            problem = f"hung for {worker.seconds:g} s"
        elif code < 0:
            problem = f"ended its process by signal {-code} ({signal_name(-code)})"
        else:
            problem = f"ended its process with exit status {code}"
        return {"problem": problem, "detail": stack}

    def _drop(self, worker: Worker) -> tuple[int, str]:
        if worker not in self.workers:
            return 0, ""
        self.workers.remove(worker)
        return worker.end()


def other_hash_seed() -> str:
    """A fixed seed of Python's hashes that is not this process's."""
    return "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"


def signal_name(number: int) -> str:
    """SIGSEGV for 11; SIGKILL with its usual cause."""
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    return f"{name}: out of memory?" if number == signal.SIGKILL else name


def _refusal(name: str, message: dict[str, Any]) -> str:
    where = f"\n{message['detail']}" if message.get("detail") else ""
    return (
        f"task={name}: a scoring process, which is a fresh Python, cannot create this task: "
        f"{message['problem']}; define it in a module that any process can import, or score in the "
        f"rank's own process (reward.workers=0), which cannot interrupt a score that hangs{where}"
    )
