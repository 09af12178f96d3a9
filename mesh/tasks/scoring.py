"""Outcome of one call of a task's score function, in any process."""

from __future__ import annotations

import math
import numbers
import traceback
from dataclasses import dataclass
from typing import Any

from mesh.types import Prompt

MAX_DETAIL = 20_000  # characters kept of a traceback, from its end


@dataclass(frozen=True)
class Outcome:
    """A reward; or a `problem`: what the score function did, with its traceback or stack
    (`detail`) and, if raised in this process, the exception.
    """

    reward: float = 0.0
    problem: str = ""
    detail: str = ""
    error: BaseException | None = None


def outcome_of(task: Any, prompt: Prompt, response: str) -> Outcome:
    """Call `task.score`. Anything but a finite number is a problem: a made-up reward would be
    trained on unnoticed.
    """
    try:
        reward = task.score(prompt, response)
        number = float(reward) if isinstance(reward, numbers.Real) else math.nan
    except (Exception, SystemExit) as error:  # user code may raise anything
        inside = error.__traceback__.tb_next if error.__traceback__ else None
        lines = traceback.format_exception(type(error), error, inside)
        problem = f"raised {type(error).__name__}: {error}"
        return Outcome(problem=problem, detail="".join(lines)[-MAX_DETAIL:], error=error)
    if not math.isfinite(number):
        return Outcome(problem=f"returned {reward!r}")
    return Outcome(number)


def describe_failure(task: Any, prompt: Prompt, response: str, problem: str) -> str:
    """Format a failed score with all its inputs."""
    return (
        f"the score function of {task!r} {problem}\n"
        f"  prompt:   {prompt.text!r}\n"
        f"  response: {response!r}\n"
        f"  answer:   {prompt.answer!r}"
    )
