"""The rank's side of the processes that score (`mesh/tasks/worker.py`): jobs out, outcomes in.

One thread serves all of them. A process has one job at a time, so many seconds for it, and the next
one at hand: waiting for an answer first would cost as much again as a quick score does. A process
that hangs or ends is replaced when there is work for another one; what it was scoring is a problem,
not an error: what to do about it is the caller's to say.
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

from mesh.tasks.scoring import MOST_DETAIL, Outcome
from mesh.tasks.worker import HEADER, KILL, send

START_SECONDS = 300.0  # the longest that the import of a task may take
CLOSE_SECONDS = 5.0  # for the atexit handlers of user code
KILL_SECONDS = 10.0
SMALL = 1 << 15  # bytes
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from mesh.tasks.worker import main; main()"
)


class Worker:
    """One process that scores, with its keeper. Not the torch, signals or files of this one."""

    def __init__(self, name: str, seed: int, args: dict[str, Any]):
        self.talk, talk = socket.socketpair()
        self.life, life = socket.socketpair()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115
        theirs = [talk.fileno(), life.fileno(), self.stacks.fileno()]
        paths = json.dumps([path for path in sys.path if isinstance(path, str)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT, paths, *map(str, theirs), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C is the rank's
        )
        talk.close()
        life.close()
        self.ready = self.hung_up = False
        self._life_poll = select.poll()
        self._life_poll.register(self.life, select.POLLIN)
        self.jobs: deque[int] = deque()
        self._buffer = bytearray()
        self._give(pickle.dumps((name, seed, args)), START_SECONDS)

    def takes(self, content: bytes) -> bool:
        """Whether it can have this job: as its only one, or as one more that fits into the socket
        while it is at work, so that handing it over waits for nothing.
        """
        return self.ready and (not self.jobs or len(self.jobs) < 2 and len(content) < SMALL)

    def give(self, job: int, content: bytes, seconds: float) -> None:
        """Hand a job over that it `takes`."""
        self.jobs.append(job)
        self._give(content, seconds)

    def next(self) -> None:
        """Its present job is over; the time of the next one begins."""
        self.jobs.popleft()
        self.deadline = time.monotonic() + self.seconds

    def _give(self, content: bytes, seconds: float) -> None:
        if len(self.jobs) < 2:
            self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.talk.settimeout(seconds)
        with contextlib.suppress(OSError):  # it has ended, and `life` will say how
            send(self.talk, content)
        self.talk.setblocking(False)

    def message(self) -> dict[str, Any] | None:
        """What it has answered, if all of it is here."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while part := self.talk.recv(1 << 16):
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
        """Whether it is gone; all that it answered before can be read then."""
        return bool(self._life_poll.poll(0))

    def end(self) -> tuple[int, str]:
        """(exit code as of `subprocess`, stack) of a process that has ended, or is ended here with
        all that it has started.
        """
        with contextlib.suppress(OSError):
            self.life.sendall(KILL)
        return self._status(KILL_SECONDS), self._stack()

    def close(self, deadline: float) -> None:
        """Let it end by itself until then, or else end it, with all that it has started."""
        self.life.settimeout(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            self.life.recv(16, socket.MSG_PEEK)
        self.end()

    def _status(self, seconds: float) -> int:
        self.talk.close()
        self.life.settimeout(seconds)
        word = b""
        with contextlib.suppress(OSError):
            word = self.life.recv(16)
        self.life.close()
        try:
            code = self.process.wait(1.0 if word else seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the keeper; the child ends with it
            code = self.process.wait()
        return int(word) if word else code

    def _stack(self) -> str:
        with self.stacks:
            self.stacks.seek(0)
            return self.stacks.read(MOST_DETAIL).decode(errors="replace")


class Pool:
    """Up to `num_workers` processes for one task, started when there are jobs for them."""

    def __init__(self, name: str, seed: int, args: dict[str, Any], num_workers: int):
        self.task = (name, seed, args)
        self.num_workers = num_workers
        self.workers: list[Worker] = []

    def outcomes(
        self, jobs: Sequence[bytes], seconds: float
    ) -> Generator[tuple[int, Outcome], None, None]:
        """The outcome of every job by its index, as they come; a job has so many seconds.

        Raises ValueError where no process can make the task. Ends the processes that are at work if
        the caller does not want the rest.
        """
        waiting, left = deque(range(len(jobs))), len(jobs)
        try:
            while left:
                self._let_go()
                while len(self.workers) < min(self.num_workers, left):
                    self.workers.append(Worker(*self.task))
                for num in (0, 1):
                    for worker in self.workers:
                        if waiting and worker.takes(jobs[waiting[0]]) and len(worker.jobs) == num:
                            index = waiting.popleft()
                            worker.give(index, jobs[index], seconds)
                for worker in self._stirring():
                    while (found := self._heard(worker)) is not None:
                        left -= 1
                        yield found
                    if worker not in self.workers:
                        waiting.extendleft(reversed(worker.jobs))
        finally:
            for worker in [worker for worker in self.workers if worker.jobs]:
                self._drop(worker)

    def start(self) -> None:
        """Wait for one process that has made the task; ValueError where it cannot."""
        if not self.workers:
            self.workers.append(Worker(*self.task))
        while not self.workers[0].ready:
            for worker in self._stirring():
                self._heard(worker)

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self.workers:
            worker.talk.close()
        while self.workers:
            self.workers.pop().close(deadline)

    def _let_go(self) -> None:
        """Forget the workers that have ended while they had no job."""
        for worker in [w for w in self.workers if w.ready and not w.jobs and w.has_ended()]:
            self._drop(worker)

    def _stirring(self) -> list[Worker]:
        """Workers that have something to say, or whose time is up."""
        expected = [w for w in self.workers if w.jobs or not w.ready]
        poll, by_file = select.poll(), {}
        for worker in expected:
            for side in (worker.life,) if worker.hung_up else (worker.life, worker.talk):
                poll.register(side, select.POLLIN)
                by_file[side.fileno()] = worker
        first = min(worker.deadline for worker in expected)
        events = poll.poll(max(0, math.ceil(1000 * (first - time.monotonic()))))
        stirring, now = [by_file[file] for file, _ in events], time.monotonic()
        return [worker for worker in expected if worker in stirring or now > worker.deadline]

    def _heard(self, worker: Worker) -> tuple[int, Outcome] | None:
        """The outcome of its job, if that is over. ValueError where it cannot make the task."""
        if worker not in self.workers or (worker.ready and not worker.jobs):
            return None
        ended, late = worker.has_ended(), time.monotonic() > worker.deadline
        message = worker.message()
        if message is None and not ended and not late:
            return None
        if message is None:
            message = self._obituary(worker, hung=not ended)
        if worker.ready:
            job = worker.jobs[0]
            worker.next()
            return job, Outcome(**message)
        if message["problem"]:
            self._drop(worker)
            raise ValueError(_refusal(self.task[0], message))
        worker.ready = True
        return None

    def _obituary(self, worker: Worker, hung: bool) -> dict[str, Any]:
        """How a process ended in the middle of something, as an answer of its own."""
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


def signal_name(number: int) -> str:
    """SIGSEGV for 11; the kernel's SIGKILL is explained."""
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    return f"{name}: did it take too much memory?" if number == signal.SIGKILL else name


def _refusal(name: str, message: dict[str, Any]) -> str:
    where = f"\n{message['detail']}" if message.get("detail") else ""
    return (
        f"task={name}: a process that scores, which is a fresh Python, cannot make this task: "
        f"{message['problem']}; define it in a module that any process can import, or score in the "
        f"rank's own process (reward.workers=0), where nothing ends a score that hangs{where}"
    )
