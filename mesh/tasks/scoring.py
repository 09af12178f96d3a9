"""What becomes of one call of a task's score function, wherever it runs."""

from __future__ import annotations

import math
import numbers
import traceback
from dataclasses import dataclass
from typing import Any

from mesh.types import Prompt

MOST_DETAIL = 20_000  # characters of a traceback that are kept, the last ones


@dataclass(frozen=True)
class Outcome:
    """A reward; or a `problem`, put as what the score function did, with what shows where
    (`detail`) and the exception, where it was raised in this process.
    """

    reward: float = 0.0
    problem: str = ""
    detail: str = ""
    error: BaseException | None = None


def outcome_of(task: Any, prompt: Prompt, response: str) -> Outcome:
    """Call `task.score`. Anything but a finite number is a problem: a reward made up in its place
    would be trained on unnoticed.
    """
    try:
        reward = task.score(prompt, response)
        number = float(reward) if isinstance(reward, numbers.Real) else math.nan
    except (Exception, SystemExit) as error:  # a scorer is the user's code and may raise anything
        inside = error.__traceback__.tb_next if error.__traceback__ else None
        lines = traceback.format_exception(type(error), error, inside)
        problem = f"raised {type(error).__name__}: {error}"
        return Outcome(problem=problem, detail="".join(lines)[-MOST_DETAIL:], error=error)
    if not math.isfinite(number):
        return Outcome(problem=f"returned {reward!r}")
    return Outcome(number)


def case(task: Any, prompt: Prompt, response: str, problem: str) -> str:
    """A failed score with all that it was given."""
    return (
        f"the score function of {task!r} {problem}\n"
        f"  prompt:   {prompt.text!r}\n"
        f"  response: {response!r}\n"
        f"  answer:   {prompt.answer!r}"
    )
