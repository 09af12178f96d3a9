"""Rewards of responses: in worker processes if the task is user code, else in the rank's own.

A shipped task compares two strings. It cannot hang or crash, so a process would only add cost.
"""

from __future__ import annotations

import pickle
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.lifecycle.heartbeat import heartbeat
from mesh.tasks import Task, TaskSpec, load_task
from mesh.tasks.correct import is_correct
from mesh.tasks.pool import Pool
from mesh.tasks.response import Response, Score
from mesh.tasks.scoring import NO_SCORE, Outcome, describe_failure, outcome_of
from mesh.tasks.stops import stop_strings_of
from mesh.types import Prompt

STOP = (
    "make it return one finite number (bool, int, float, Decimal, Fraction, or a numpy or torch "
    "scalar) for every response a model may give, 0.0 for nonsense"
)


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


class Scorer:
    """Owns this rank's scoring processes, which start with the first request for rewards.

    A failed score raises (`on_failure=stop`), or is counted and becomes 0.0 (`zero`). `warned`:
    somebody has warned of its rewards.
    """

    def __init__(self, source: TaskSource) -> None:
        self.task, self.settings, spec = source.task, source.scoring, source.spec
        self.pool: Pool | None = None
        if self.settings.workers:
            self.pool = Pool(spec.name, spec.seed, dict(spec.args), self.settings.workers)
        self.warned = False
        self._failures = 0
        self._example = ""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Score]:
        """One score per response; `responses[i]` answers `prompts[i]`.

        With `on_failure=stop`, raises ValueError with task, prompt, response and failure.
        """
        assert len(prompts) == len(responses), f"{len(prompts)} prompts, {len(responses)} responses"
        pairs = list(zip(prompts, responses, strict=True))
        scores = [NO_SCORE] * len(pairs)
        with closing(self._outcomes(pairs)) as outcomes:
            for index, outcome in outcomes:
                heartbeat()
                scores[index] = outcome.score
                if outcome.problem:
                    shown = describe_failure(self.task, *pairs[index], outcome.problem)
                    self._failed(shown, outcome)
        return scores

    def failures(self) -> tuple[int, str]:
        """Number of failed scores since the last call, and one of them."""
        failures, example = self._failures, self._example
        self._failures, self._example = 0, ""
        return failures, example

    def close(self) -> None:
        """End the scoring processes."""
        if self.pool is not None:
            self.pool.close()

    def _outcomes(
        self, pairs: Sequence[tuple[Prompt, Response]]
    ) -> Generator[tuple[int, Outcome], None, None]:
        if self.pool is None:
            return ((i, outcome_of(self.task, *pair)) for i, pair in enumerate(pairs))
        try:
            jobs = [pickle.dumps(pair) for pair in pairs]
        except Exception as error:  # a user's own prompt class may hold anything
            raise ValueError(
                f"the prompts of {self.task!r} cannot be sent to a scoring process ({error}); "
                "use plain data in them, or set reward.workers=0"
            ) from error
        return self.pool.outcomes(jobs, self.settings.timeout_seconds)

    def _failed(self, shown: str, outcome: Outcome) -> None:
        if self.settings.on_failure == "stop":
            limit = f"reward.timeout_seconds={self.settings.timeout_seconds:g}"
            within = f", within {limit}," if self.pool is not None else ""
            detail = f"\n{outcome.detail}" if outcome.detail and outcome.error is None else ""
            raise ValueError(
                f"{shown}\n{STOP}{within} or count it as 0.0 (reward.on_failure=zero){detail}"
            ) from outcome.error
        self._failures += 1
        self._example = self._example or shown


def num_workers(conf: Conf) -> int:
    """Scoring processes per engine: `reward.workers`, else one if the task is user code."""
    if conf.reward.workers is not None:
        return conf.reward.workers
    return 1 if ":" in conf.task else 0


def scoring_of(conf: Conf) -> ScoringSettings:
    """The keys of `reward`, defaults resolved."""
    return ScoringSettings(num_workers(conf), conf.reward.timeout_seconds, conf.reward.on_failure)


def checked_task(spec: TaskSpec, workers: int, num: int = 0) -> tuple[Task, list[str]]:
    """(a task, texts of `num` prompts of the first step as a scoring process draws them; none
    without `workers`). Raises ValueError if it cannot be created here or, with `workers`, in a
    scoring process, or if it cannot say what is correct or what ends a turn.
    """
    drawn: list[str] = []
    task = load_task(spec.name, spec.seed, dict(spec.args))
    is_correct(task, 1.0)
    stop_strings_of(task)
    if workers:
        with closing(Pool(spec.name, spec.seed, dict(spec.args), 1)) as pool:
            drawn = pool.start(num)
    return task, drawn


def reward_problems(conf: Conf) -> list[str]:
    """A time limit for scores beyond what the waiting ranks allow."""
    limit, found = conf.reward.timeout_seconds, []
    if not num_workers(conf):
        return []
    for name in ("timeout_seconds", "stall_seconds"):
        longest = getattr(conf, name)
        if longest and limit >= longest:  # stall_seconds=0: no limit
            wrong = f"the other ranks wait no longer than {name}={longest}"
            remedy = f"use less, or raise {name}"
            found.append(problem("reward.timeout_seconds", limit, wrong, remedy))
    return found
