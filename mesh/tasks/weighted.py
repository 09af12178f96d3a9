"""Several score functions as one: the reward is their weighted sum, and each is a part.

In a task, in place of the method:

    score = WeightedScore({"right": (judges.number, 1.0), "brief": (brevity, 0.2)})

By the keys `scores` and `score_weights`, functions are added to whatever the task's own score is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.config.user_code import import_named
from mesh.tasks.correct import is_correct
from mesh.tasks.response import Response, Score
from mesh.tasks.returned import Unusable, name_problem, score_of
from mesh.types import Prompt

ScoreFunction = Callable[..., Any]
"""Of (prompt, response), or of (answer, response) where the first parameter is called `answer`, as
that of a judge. It returns what a task's `score` may return."""

OWN = "task"
"""The part that is the reward of the task's own score, where functions are added to it."""


@dataclass(frozen=True)
class WeightedScore:
    """A score function: the sum of weight * reward of several functions, by their names.

    Each reward, without its weight, is the part of that name, and a part that a function returns
    is NAME.PART. `correct` and `answer` are those of the first function that gives one. Raises
    ValueError for a name that no part can have, a weight that is no finite number, and what cannot
    be called.
    """

    functions: Mapping[str, tuple[ScoreFunction, float]]

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("WeightedScore: no function is given; give {NAME: (FUNCTION, WEIGHT)}")
        for name, (function, weight) in self.functions.items():
            wrong = name_problem(name)
            if not callable(function):
                wrong = f"the function of {name} is {function!r}, which cannot be called"
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                wrong = f"the weight of {name} is {weight!r}, which is no finite number"
            if wrong:
                raise ValueError(f"WeightedScore: {wrong}")

    def __call__(self, prompt: Prompt, response: Response) -> Score:
        rewards: list[float] = []
        parts: dict[str, float] = {}
        correct: bool | None = None
        answer: str | None = None
        for name, (function, weight) in self.functions.items():
            one = self._score(name, function, prompt, response)
            rewards.append(weight * one.reward)
            parts |= {name: one.reward} | {f"{name}.{k}": v for k, v in one.parts.items()}
            correct = one.correct if correct is None else correct
            answer = one.answer if answer is None else answer
        return Score(math.fsum(rewards), parts, correct, answer)

    def _score(self, name: str, function: ScoreFunction, prompt: Prompt, response: Response) -> Any:
        first = next(iter(inspect.signature(function).parameters), "")
        found = function(prompt.answer if first == "answer" else prompt, response)
        try:
            return score_of(found)
        except Unusable as wrong:
            raise Unusable(f"{wrong}, by its function {name}") from None


@dataclass(frozen=True, repr=False)
class WithScores:
    """A task whose score has functions added to it. What is correct is still the task's to say, of
    its own reward.
    """

    task: Any
    added: WeightedScore

    def score(self, prompt: Prompt, response: Response) -> Score:
        own, more = score_of(self.task.score(prompt, response)), self.added(prompt, response)
        parts = {OWN: own.reward} | dict(own.parts)
        if twice := parts.keys() & more.parts.keys():
            raise Unusable(f"has the part {min(twice)}, and so has a function of scores")
        correct = is_correct(self.task, own.reward, own.correct)
        parts |= more.parts
        return Score(own.reward + more.reward, parts, correct, own.answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def __repr__(self) -> str:
        return repr(self.task)


def with_scores(task: Any, scores: Mapping[str, float]) -> Any:
    """The task with functions MODULE:FUNCTION, by weights, added to its score."""
    return WithScores(task, named_scores(scores)) if scores else task


def named_scores(scores: Mapping[str, float]) -> WeightedScore:
    """The functions of `scores=[MODULE:FUNCTION]`, each a part by its name. Raises ValueError for
    what is not there, is no function, or has the name of another one.
    """
    found: dict[str, tuple[ScoreFunction, float]] = {}
    for full, weight in scores.items():
        module, name = import_named("scores", full, "my_scores:brevity")
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"scores={full}: {module.__name__} has no function {name}")
        if name in found or name == OWN:
            raise ValueError(f"scores={full}: another part is called {name}; rename the function")
        found[name] = function, weight
    return WeightedScore(found)
