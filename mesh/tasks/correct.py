"""Correctness of a response in an evaluation: the task's to say, or else a reward of 1.

A score that says `correct` is believed. Else a task that has `is_correct(reward: float) -> bool` is
asked. It runs in the rank's own process, as it is to compare one number.
"""

from __future__ import annotations

from typing import Any

from mesh.config.user_code import call_user_code
from mesh.tasks.returned import only_element

METHOD = "is_correct"
ALMOST_ONE = 1 - 1e-6
"""The least reward of a correct response of a task that does not say: 0.7 + 0.2 + 0.1 is less than
1 in float64, and such sums in float32 are off by 1e-7."""


def is_correct(task: Any, reward: float, correct: bool | None = None) -> bool:
    """True if a response with this reward is correct; `correct`: what its score says of it, which
    counts where it is not None. Raises ValueError if the task's method raises or returns no bool.
    """
    if correct is not None:
        return correct
    if not hasattr(task, METHOD):
        return reward >= ALMOST_ONE
    what = f"{METHOD}({reward!r}) of {task!r}"
    found = call_user_code(what, lambda: getattr(task, METHOD)(reward))
    said = only_element(found)
    if not isinstance(said, bool):
        raise ValueError(f"{what} returned {found!r}; return True or False")
    return said


def correctness_rule(task: Any) -> str:
    """The rule in words, for a message."""
    if hasattr(task, METHOD):
        return f"the task's {METHOD} says so"
    return f"its reward is at least {ALMOST_ONE}"
