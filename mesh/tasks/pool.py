"""The rank's processes for calls of a task's methods: jobs out, outcomes in.

One thread serves all of them. A process has a time limit for its current job. Behind it, quick jobs
are queued: sending one only after the answer would double the cost of a quick score, and replies
are looked at between two steps of an engine. Slow jobs are not: another process may be free sooner.
A process that hangs or ends is replaced when there is work for another one; the job it had becomes
a problem, not an error: the caller decides what to do about it.
"""

from __future__ import annotations

import math
import select
import signal
import time
from collections import deque
from typing import Any

from mesh.tasks import TaskSpec
from mesh.tasks.handle import Job, Worker
from mesh.tasks.scoring import Outcome, received

QUICK_SECONDS = 2e-3  # that a process's queue takes
MOST_QUEUED = 64
CLOSE_SECONDS = 5.0  # for the atexit handlers of user code


class Pool:
    """Up to `num_workers` processes for one task, started on demand; each job has `seconds`."""

    def __init__(self, task: TaskSpec, num_workers: int, seconds: float):
        self.task, self.num_workers, self.seconds = task, num_workers, seconds
        self.workers: list[Worker] = []
        self.waiting: deque[Job] = deque()
        self.pace = QUICK_SECONDS / 2  # of the last jobs, in seconds

    @property
    def num_jobs(self) -> int:
        """Jobs without an outcome."""
        return len(self.waiting) + sum(len(worker.jobs) for worker in self.workers)

    def submit(self, job: Job) -> None:
        """Queue a job, whose outcome `poll` returns."""
        self.waiting.append(job)

    def poll(self, seconds: float = math.inf) -> list[tuple[Job, Outcome]]:
        """Jobs that have finished, in any order; waits up to `seconds` for the first one.

        Processes work on between two calls, each on a job and the next. A time limit is looked at
        in a call. Raises ValueError if a process cannot create the task.
        """
        until = time.monotonic() + seconds
        found: list[tuple[Job, Outcome]] = []
        while self.num_jobs and not found:
            self._hand_out()
            for worker in self._active(until):
                while (one := self._collect(worker)) is not None:
                    found.append(one)
                if worker not in self.workers:
                    self.waiting.extendleft(reversed(worker.jobs))
            if time.monotonic() >= until:
                break
        self._hand_out()
        return found

    def cancel(self) -> None:
        """Forget all jobs; processes that were busy with one are killed."""
        self.waiting.clear()
        for worker in [worker for worker in self.workers if worker.jobs]:
            self._drop(worker)

    def start(self, num: int = 0) -> list[str]:
        """Wait until one process has created the task; texts of `num` prompts of the first step, as
        it draws them. Raises ValueError if it cannot create it.
        """
        if not self.workers:
            self.workers.append(Worker(self.task, num))
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

    def _hand_out(self) -> None:
        """Give waiting jobs to workers, idle ones first; start workers that are missing."""
        if not self.waiting:
            return
        for worker in [w for w in self.workers if w.ready and not w.jobs and w.has_ended()]:
            self._drop(worker)
        while len(self.workers) < min(self.num_workers, self.num_jobs):
            self.workers.append(Worker(self.task))
        depth = max(1, min(MOST_QUEUED, int(QUICK_SECONDS / max(self.pace, 1e-6))))
        for num in range(depth):
            for worker in self.workers:
                if not self.waiting:
                    return
                if len(worker.jobs) == num and worker.takes(self.waiting[0], depth):
                    worker.submit(self.waiting.popleft(), self.seconds)

    def _active(self, until: float = math.inf) -> list[Worker]:
        """Wait, up to `until`, for workers with something to read, or past their deadline."""
        expected = [w for w in self.workers if w.jobs or not w.ready]
        poll, by_file = select.poll(), {}
        for worker in expected:
            sockets = (worker.liveness,) if worker.hung_up else (worker.liveness, worker.channel)
            for side in sockets:
                poll.register(side, select.POLLIN)
                by_file[side.fileno()] = worker
        first = min(until, *(worker.deadline for worker in expected))
        events = poll.poll(max(0, math.ceil(1000 * (first - time.monotonic()))))
        readable, now = [by_file[file] for file, _ in events], time.monotonic()
        return [worker for worker in expected if worker in readable or now > worker.deadline]

    def _collect(self, worker: Worker) -> tuple[Job, Outcome] | None:
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
            job = worker.advance()
            self.pace = (self.pace + message.get("seconds", self.seconds)) / 2
            return job, received(message)
        if message["problem"]:
            self._drop(worker)
            raise ValueError(_refusal(self.task.name, message))
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
