"""What a task's `score` may return, as plain floats: any real scalar, or a `Score` of them."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any

from mesh.tasks.response import Score
from mesh.types import LARGEST_REWARD

MAX_SHOWN = 300  # characters shown of what cannot be used
OUR_PARTS = ("mean", "std", "failed", "correct")
"""Names of our own metrics `reward/NAME`."""

PART_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class Unusable(ValueError):
    """A value that a method of a task may not return; the message says why."""


def score_of(value: Any) -> Score:
    """The score that a score function returned: a `Score`, or a reward alone.

    Raises Unusable for a reward or a part that is none (`reward_of`), for a name of a part that no
    metric can have or that is ours, for a `correct` that is neither True, False nor None, and for
    an `answer` that is no text.
    """
    if not isinstance(value, Score):
        return Score(reward_of(value))
    reward = _inside("reward", value.reward, reward_of)
    if not isinstance(value.parts, Mapping):
        raise Unusable(f"{shown(value.parts)} as the parts of a Score; give a dict of numbers")
    if wrong := [text for name in value.parts if (text := name_problem(name))]:
        raise Unusable(f"returned a Score of which {wrong[0]}")
    parts = {name: _inside(f"part {name}", v, reward_of) for name, v in value.parts.items()}
    correct = _inside("correct", value.correct, _correct_of)
    return Score(reward, parts, correct, _inside("answer", value.answer, _answer_of))


def reward_of(value: Any) -> float:
    """The reward that a score function returned: any real scalar, also as a numpy array or torch
    tensor of one element. What float64 cannot hold is rounded once, like Decimal("0.1").

    Raises Unusable for anything else, for what is not finite or beyond LARGEST_REWARD, and for an
    integer that float64 does not have: two rewards that differ must not become equal.
    """
    scalar = only_element(value)
    if isinstance(scalar, str | bytes | bytearray) or not hasattr(type(scalar), "__float__"):
        raise Unusable(f"{shown(value)}, which is no real number")
    try:
        number = float(scalar)
    except OverflowError:
        number = LARGEST_REWARD * 2
    if not math.isfinite(number):
        raise Unusable(f"{shown(value)}, which is not finite in float64")
    if abs(number) > LARGEST_REWARD:
        raise Unusable(f"{shown(value)}, beyond the largest reward, {LARGEST_REWARD:g}")
    if isinstance(scalar, numbers.Integral) and number != scalar:
        raise Unusable(f"{shown(value)}, an integer that float64 rounds to {number:.0f}")
    return number


def shown(value: Any) -> str:
    """The value and its type, as in "returned 5 of type int"."""
    text = " ".join(repr(value).split())
    cut = "..." if len(text) > MAX_SHOWN else ""
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"returned {text[:MAX_SHOWN]}{cut} of type {name}"


def _inside(what: str, value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except Unusable as wrong:
        raise Unusable(f"{wrong}, as the {what} of a Score") from None


def name_problem(name: Any) -> str:
    """The reason why a part cannot have this name; "": it can."""
    if not isinstance(name, str) or not PART_NAME.fullmatch(name):
        return f"a part is called {name!r}; a name has letters, digits, _, - and . only"
    if name in OUR_PARTS:
        return f"a part is called {name!r}, but reward/{name} is a metric of ours; rename the part"
    return ""


def _correct_of(value: Any) -> bool | None:
    scalar = only_element(value)
    if scalar is not None and not isinstance(scalar, bool):
        raise Unusable(f"{shown(value)}, which is neither True, False nor None")
    return scalar


def _answer_of(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise Unusable(f"{shown(value)}, which is no text")
    return None if value is None else str(value)


def only_element(value: Any) -> Any:
    """The element of an array or tensor as a Python scalar, of whatever library; else `value`."""
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not hasattr(value, "item"):
        return value
    if math.prod(shape) != 1:
        raise Unusable(f"{shown(value)}, which has {math.prod(shape)} elements instead of one")
    return value.item()
