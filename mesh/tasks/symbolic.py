"""math-verify, behind one door: expressions of a text, and whether two are equal.

Its own time limits are off. They count what takes too long as wrong, which depends on how busy the
machine is, and they need the main thread's alarm. A scoring process has a limit that says so
(`reward.timeout_seconds`).
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

from mesh.tasks.numerals import number_of

MINUS = dict.fromkeys(map(ord, "\u2212\ufe63\uff0d"), "-")
INSTALL = "math-verify is not installed; pip install math-verify, or use another judge"


@cache
def library() -> ModuleType:
    """math-verify. Raises ValueError where it is not installed."""
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(f"task_args.judge=math: {INSTALL}") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of limits that are off
    return math_verify


def in_response(text: str) -> list[Any]:
    """The last expression of a response: its parsed form and its text. Empty: it has none."""
    return list(library().parse(text.translate(MINUS), parsing_timeout=None))


def in_answer(text: str) -> list[Any]:
    """The expression of a data set's answer, which may be LaTeX without dollars around it."""
    number = number_of(text)
    if number is not None:  # which math-verify reads in fewer forms: 1e3 is 1 to it
        text = f"$\\frac{{{number.numerator}}}{{{number.denominator}}}$"
    return in_response(text) or in_response(f"${text}$")


def equal(wanted: list[Any], found: list[Any]) -> bool:
    """True if an expression of `found` equals one of `wanted`."""
    return bool(library().verify(wanted, found, timeout_seconds=None))
