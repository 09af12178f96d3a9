"""Values of arithmetic expressions: integers, `+`, `-`, `*` and parentheses, and nothing else.

A parser of its own, since what a model writes is never given to `eval`.
"""

from __future__ import annotations

import re

MAX_CHARACTERS = 100
"""The longest expression: it bounds the depth of parentheses and the size of the value."""

SYMBOL = re.compile(r" *(?:([0-9]+)|([-+*()]))")


def evaluated(text: str) -> int:
    """The value of an expression. Raises ValueError where it is none, or too long."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"an expression has at most {MAX_CHARACTERS} characters")
    symbols = _symbols(text.rstrip(" "))
    value, end = _sum(symbols, 0)
    if end != len(symbols) - 1:
        raise ValueError(f"{symbols[end]!r} was not expected")
    return value


def _symbols(text: str) -> list[str]:
    """Numbers and operators in order, and "" at the end."""
    found, place = [], 0
    while place < len(text):
        match = SYMBOL.match(text, place)
        if match is None:
            raise ValueError(f"{text[place]!r} is no part of an expression")
        found.append(match[1] or match[2])
        place = match.end()
    return [*found, ""]


def _sum(symbols: list[str], place: int) -> tuple[int, int]:
    """(value, place behind it) of terms that are added and subtracted, from the left."""
    value, place = _product(symbols, place)
    while symbols[place] in ("+", "-"):
        sign = 1 if symbols[place] == "+" else -1
        term, place = _product(symbols, place + 1)
        value += sign * term
    return value, place


def _product(symbols: list[str], place: int) -> tuple[int, int]:
    value, place = _factor(symbols, place)
    while symbols[place] == "*":
        factor, place = _factor(symbols, place + 1)
        value *= factor
    return value, place


def _factor(symbols: list[str], place: int) -> tuple[int, int]:
    """A number, what is in parentheses, or either of them behind a minus."""
    symbol = symbols[place]
    if symbol == "-":
        value, place = _factor(symbols, place + 1)
        return -value, place
    if symbol == "(":
        value, place = _sum(symbols, place + 1)
        if symbols[place] != ")":
            raise ValueError("a parenthesis is not closed")
        return value, place + 1
    if not symbol.isdigit():
        raise ValueError(f"{symbol!r} was not expected")
    return int(symbol), place + 1
