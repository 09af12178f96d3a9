"""Calls of a task's `score` and `reply`: in worker processes if the task is user code, else in the
rank's own.

A shipped task compares two strings. It cannot hang or crash, so a process would only add cost.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mesh.lifecycle.heartbeat import heartbeat
from mesh.tasks import Task, TaskSpec
from mesh.tasks.handle import Job
from mesh.tasks.pool import Pool
from mesh.tasks.scoring import OUTCOMES, Outcome, describe_failure
from mesh.tasks.weighted import with_scores
from mesh.types import Prompt, Reply, TurnText

REMEDIES = {
    "score": "make it return one finite number (bool, int, float, Decimal, Fraction, or a numpy or "
    "torch scalar), or a Score of such numbers, for every response a model may give, 0.0 for "
    "nonsense",
    "reply": "make it return a text, a message, several messages, or None at the end, for every "
    "response a model may give",
}


@dataclass(frozen=True)
class ScoringSettings:
    """Settings for scoring one task. workers: processes per engine; 0: the rank itself scores."""

    workers: int
    timeout_seconds: float
    on_failure: Literal["stop", "zero"]


@dataclass(frozen=True)
class TaskSource:
    """A task, the spec from which scoring processes create their own, and how it is scored."""

    task: Task
    spec: TaskSpec
    scoring: ScoringSettings


class Calls:
    """Owns this rank's processes, which start with the first call.

    A failed call raises (`on_failure=stop`), or is counted and has an outcome with a problem.
    """

    def __init__(self, source: TaskSource) -> None:
        self.task = with_scores(source.task, source.spec.scores)
        self.settings = source.scoring
        self.pool: Pool | None = None
        if self.settings.workers:
            self.pool = Pool(source.spec, self.settings.workers, self.settings.timeout_seconds)
        self._waiting: deque[Job] = deque()  # without processes
        self._failures = 0
        self._example = ""

    @property
    def num(self) -> int:
        """Calls without an outcome."""
        return len(self._waiting) if self.pool is None else self.pool.num_jobs

    def submit(self, key: Any, method: str, *arguments: Any) -> None:
        """Call a method of the task, whose outcome `poll` returns under this key."""
        if self.pool is None:
            self._waiting.append(Job(key, method, arguments))
            return
        try:
            content = pickle.dumps((method, *arguments))
        except Exception as error:  # a user's own prompt class may hold anything
            raise ValueError(
                f"the prompts of {self.task!r} cannot be sent to a scoring process ({error}); "
                "use plain data in them, or set reward.workers=0"
            ) from error
        self.pool.submit(Job(key, method, arguments, content))

    def poll(self, seconds: float = math.inf) -> list[tuple[Any, Outcome]]:
        """Calls that have finished, by their keys, in any order; waits up to `seconds` for one.

        With `on_failure=stop`, raises ValueError with task, prompt, turns and failure, and forgets
        all other calls.
        """
        found, done = [], False
        try:
            for job, outcome in self._run() if self.pool is None else self.pool.poll(seconds):
                heartbeat()
                if outcome.problem:
                    self.fail(job, outcome)
                found.append((job.key, outcome))
            done = True
        finally:
            if not done:
                self.cancel()
        return found

    def cancel(self) -> None:
        """Forget all calls; processes that are busy with one are killed."""
        self._waiting.clear()
        if self.pool is not None:
            self.pool.cancel()

    def failures(self) -> tuple[int, str]:
        """Number of failed calls since this was last asked, and one of them."""
        failures, example = self._failures, self._example
        self._failures, self._example = 0, ""
        return failures, example

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.close()

    def _run(self) -> Iterator[tuple[Job, Outcome]]:
        """Do the waiting calls in this process."""
        while self._waiting:
            job = self._waiting.popleft()
            yield job, OUTCOMES[job.method](self.task, *job.arguments)

    def fail(self, job: Job, outcome: Outcome) -> None:
        """Raise, or count it, as `on_failure` says."""
        prompt, said = job.arguments[:2]
        turns = said.turns if job.method == "score" else said
        shown = describe_failure(self.task, job.method, prompt, turns, outcome.problem)
        if self.settings.on_failure == "stop":
            limit = f"reward.timeout_seconds={self.settings.timeout_seconds:g}"
            within = f", within {limit}," if self.pool is not None else ""
            detail = f"\n{outcome.detail}" if outcome.detail and outcome.error is None else ""
            remedy = f"{REMEDIES[job.method]}{within} or count it as 0.0 (reward.on_failure=zero)"
            raise ValueError(f"{shown}\n{remedy}{detail}") from outcome.error
        self._failures += 1
        self._example = self._example or shown


class Replied(NamedTuple):
    """A reply that has arrived; None: the conversation is over. failed: its call has failed and is
    counted, so that the conversation ends there, and its score is 0.0 (`NO_SCORE`).
    """

    key: Any
    reply: Reply
    failed: bool


class Replies:
    """Owns the replies of the environment, as they become ready: nobody waits for the slowest.

    Replies and scores of a task share processes: no reply is out when scores are asked for.
    warning: about one of them, which no rank has said yet; warned: some rank has said one.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.warning = ""
        self.warned = False

    @property
    def num(self) -> int:
        """Replies that are not there yet."""
        return self._calls.num

    def submit(self, key: Any, prompt: Prompt, turns: Sequence[TurnText], seed: int) -> None:
        """Ask for the reply to a conversation, under a key of the caller's."""
        self._calls.submit(key, "reply", prompt, tuple(turns), seed)

    def refuse(self, prompt: Prompt, turns: Sequence[TurnText], problem: str) -> None:
        """Count a reply that has arrived and is of no use as a call that failed; raises as `poll`
        does.
        """
        self._calls.fail(Job("", "reply", (prompt, tuple(turns))), Outcome(problem=problem))

    def poll(self, seconds: float) -> list[Replied]:
        """Replies that are there, in any order; waits up to `seconds` for the first one, without
        using the CPU. 0: looks, and does not wait.

        With `on_failure=stop`, raises ValueError with task, prompt, turns and failure.
        """
        return [
            Replied(key, outcome.reply, bool(outcome.problem))
            for key, outcome in self._calls.poll(seconds)
        ]
