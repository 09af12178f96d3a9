"""Scores of responses, and how the keys of `reward` ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.tasks import Task, TaskSpec, load_task, prepare
from mesh.tasks.calls import Calls, Replies, ScoringSettings, TaskSource
from mesh.tasks.classes import scored_apart
from mesh.tasks.correct import is_correct
from mesh.tasks.pool import Pool
from mesh.tasks.replying import signature_problem
from mesh.tasks.response import Response, Score
from mesh.tasks.scoring import NO_SCORE
from mesh.tasks.stops import stop_strings
from mesh.tasks.told import tell_tokenizer
from mesh.tasks.weighted import with_scores
from mesh.types import Prompt


class Scorer:
    """Owns the calls of a task's `score` and `reply`.

    A failed score raises (`on_failure=stop`), or is counted and becomes 0.0 (`zero`). `warned`:
    somebody has warned of its rewards.
    """

    def __init__(self, source: TaskSource) -> None:
        self.task, self.settings = source.task, source.scoring
        self.calls = Calls(source)
        self.replies = Replies(self.calls)
        self.warned = False

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Score]:
        """One score per response; `responses[i]` answers `prompts[i]`.

        With `on_failure=stop`, raises ValueError with task, prompt, response and failure.
        """
        assert len(prompts) == len(responses), f"{len(prompts)} prompts, {len(responses)} responses"
        assert not self.calls.num, f"{self.calls.num} replies are still out"
        for index, pair in enumerate(zip(prompts, responses, strict=True)):
            self.calls.submit(index, "score", *pair)
        scores = [NO_SCORE] * len(prompts)
        while self.calls.num:
            for index, outcome in self.calls.poll():
                scores[index] = outcome.score
        return scores

    def failures(self) -> tuple[int, str]:
        """Number of failed scores and replies since the last call, and one of them."""
        return self.calls.failures()

    def close(self) -> None:
        """End the scoring processes."""
        self.calls.close()


def num_workers(conf: Conf) -> int:
    """Scoring processes per engine: `reward.workers`, else one where a score may hang."""
    if conf.reward.workers is not None:
        return conf.reward.workers
    return int(bool(conf.scores) or scored_apart(conf.task, conf.task_args))


def scoring_of(conf: Conf) -> ScoringSettings:
    """The keys of `reward`, defaults resolved."""
    return ScoringSettings(num_workers(conf), conf.reward.timeout_seconds, conf.reward.on_failure)


def checked_task(
    spec: TaskSpec, workers: int, num: int = 0, reads: bool = True
) -> tuple[Task, list[str]]:
    """(a task, texts of `num` prompts of the first step as a scoring process draws them; none
    without `workers`). Raises ValueError if it cannot be created here or, with `workers`, in a
    scoring process, or if it cannot say what is correct or what ends a turn. reads: it will be
    asked for prompts, so its data, where it has some, is read and checked here.
    """
    drawn: list[str] = []
    task = load_task(spec.name, spec.seed, dict(spec.args))
    tell_tokenizer(task, spec.tokenizer)
    is_correct(task, 1.0)
    stop_strings(task)
    if reads:
        prepare(task)
    with_scores(task, spec.scores)
    if wrong := signature_problem(task):
        raise ValueError(f"task={spec.name}: {wrong}")
    if workers:
        with closing(Pool(spec, 1, 0.0)) as pool:
            drawn = pool.start(num)
    return task, drawn


def reward_problems(conf: Conf) -> list[str]:
    """Weights that are not one for each function, and a time limit beyond that of waiting ranks."""
    limit, found = conf.reward.timeout_seconds, []
    if conf.score_weights and len(conf.score_weights) != len(conf.scores):
        wrong = f"it has {len(conf.score_weights)}, and scores has {len(conf.scores)}"
        found.append(problem("score_weights", conf.score_weights, wrong, "give one for each"))
    if len(set(conf.scores)) < len(conf.scores):
        found.append(problem("scores", conf.scores, "names a function twice", "name it once"))
    if not num_workers(conf):
        return found
    for name in ("timeout_seconds", "stall_seconds"):
        longest = getattr(conf, name)
        if longest and limit >= longest:  # stall_seconds=0: no limit
            wrong = f"the other ranks wait no longer than {name}={longest}"
            remedy = f"use less, or raise {name}"
            found.append(problem("reward.timeout_seconds", limit, wrong, remedy))
    return found
