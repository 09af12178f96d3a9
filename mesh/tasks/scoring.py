"""Outcome of one call of a task's score function, in any process: a score or a problem."""

from __future__ import annotations

import math
import numbers
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.tasks.response import Response, Score
from mesh.types import LARGEST_REWARD, Prompt

MAX_DETAIL = 20_000  # characters kept of a traceback, from its end
MAX_SHOWN = 300  # characters shown of what is no reward
NO_SCORE = Score(0.0)
OUR_PARTS = ("mean", "std", "failed", "correct")
"""Names of our own metrics `reward/NAME`."""
PART_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Outcome:
    """A score; or a `problem`: what the score function did, with its traceback or stack
    (`detail`) and, if raised in this process, the exception.
    """

    score: Score = NO_SCORE
    problem: str = ""
    detail: str = ""
    error: BaseException | None = None


class NoReward(ValueError):
    """A value that cannot be a reward; the message says why."""


def outcome_of(task: Any, prompt: Prompt, response: Response) -> Outcome:
    """Call `task.score`. What is no reward is a problem: a made-up one would be trained on
    unnoticed.
    """
    try:
        return Outcome(score_of(task.score(prompt, response)))
    except NoReward as wrong:
        return Outcome(problem=str(wrong))
    except (Exception, SystemExit) as error:  # user code may raise anything
        inside = error.__traceback__.tb_next if error.__traceback__ else None
        lines = traceback.format_exception(type(error), error, inside)
        problem = f"raised {type(error).__name__}: {error}"
        return Outcome(problem=problem, detail="".join(lines)[-MAX_DETAIL:], error=error)


def score_of(value: Any) -> Score:
    """The score that a score function returned, with plain floats: a `Score`, or a reward alone.

    Raises NoReward for a reward or a part that is none (`reward_of`), for a name of a part that no
    metric can have or that is ours, and for a `correct` that is neither True, False nor None.
    """
    if not isinstance(value, Score):
        return Score(reward_of(value))
    reward = _inside("reward", value.reward, reward_of)
    if not isinstance(value.parts, Mapping):
        raise NoReward(f"{_returned(value.parts)} as the parts of a Score; give a dict of numbers")
    for name in value.parts:
        _check_name(name)
    parts = {name: _inside(f"part {name}", v, reward_of) for name, v in value.parts.items()}
    return Score(reward, parts, _inside("correct", value.correct, _correct_of))


def _inside(what: str, value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except NoReward as wrong:
        raise NoReward(f"{wrong}, as the {what} of a Score") from None


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not PART_NAME.fullmatch(name):
        wrong = "names have letters, digits, _, - and . only"
        raise NoReward(f"returned a Score with a part {name!r}; {wrong}")
    if name in OUR_PARTS:
        wrong = f"reward/{name} is a metric of ours; rename the part"
        raise NoReward(f"returned a Score with a part {name!r}, but {wrong}")


def _correct_of(value: Any) -> bool | None:
    scalar = _only_element(value)
    if scalar is not None and not isinstance(scalar, bool):
        raise NoReward(f"{_returned(value)}, which is neither True, False nor None")
    return scalar


def reward_of(value: Any) -> float:
    """The reward that a score function returned: any real scalar, also as a numpy array or torch
    tensor of one element. What float64 cannot hold is rounded once, like Decimal("0.1").

    Raises NoReward for anything else, for what is not finite or beyond LARGEST_REWARD, and for an
    integer that float64 does not have: two rewards that differ must not become equal.
    """
    scalar = _only_element(value)
    if isinstance(scalar, str | bytes | bytearray) or not hasattr(type(scalar), "__float__"):
        raise NoReward(f"{_returned(value)}, which is no real number")
    try:
        number = float(scalar)
    except OverflowError:
        number = LARGEST_REWARD * 2
    if not math.isfinite(number):
        raise NoReward(f"{_returned(value)}, which is not finite in float64")
    if abs(number) > LARGEST_REWARD:
        raise NoReward(f"{_returned(value)}, beyond the largest reward, {LARGEST_REWARD:g}")
    if isinstance(scalar, numbers.Integral) and number != scalar:
        raise NoReward(f"{_returned(value)}, an integer that float64 rounds to {number:.0f}")
    return number


def _only_element(value: Any) -> Any:
    """The element of an array or tensor as a Python scalar, of whatever library; else `value`."""
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not hasattr(value, "item"):
        return value
    if math.prod(shape) != 1:
        raise NoReward(f"{_returned(value)}, which has {math.prod(shape)} elements instead of one")
    return value.item()


def _returned(value: Any) -> str:
    text = " ".join(repr(value).split())
    cut = "..." if len(text) > MAX_SHOWN else ""
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"returned {text[:MAX_SHOWN]}{cut} of type {name}"


def describe_failure(task: Any, prompt: Prompt, response: str, problem: str) -> str:
    """Format a failed score with all its inputs."""
    return (
        f"the score function of {task!r} {problem}\n"
        f"  prompt:   {prompt.question!r}\n"
        f"  response: {response!r}\n"
        f"  answer:   {prompt.answer!r}"
    )
