"""Numbers as people and models write them, read exactly.

Read are 1000, 1,000, 10{,}000, -3.50, .5, 1/2, 1 1/2, \\frac{1}{2}, 1.5e-3 and 1.5 x 10^3. A number
is a fraction of integers, so that 1/2 and 0.5 are equal and 0.1 + 0.2 is not off by a rounding.
Currency in front and units behind are not part of it: $5 is 5, and so is 5%.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

MOST_DIGITS = 1000
"""Digits of a number that is read, and its largest power of ten: what is longer is none. Python
refuses to read much longer integers, and 1e999999999 would fill the memory."""

_INTEGER = r"\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+"
_PLAIN = rf"(?:(?:{_INTEGER})(?:\.\d+)?|(?<!\.)\.\d+)"
_TIMES = r"\s*(?:x|×|\*|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*"
_POWER = rf"(?:[eE](?P<e>[+-]?\d+)|{_TIMES}\{{?(?P<ten>[+-]?\d+)\}}?)"
_OVER = r"(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?![\d/])"
_FRAC = r"\\[dt]?frac\s*\{\s*(?P<num>-?\d+)\s*\}\s*\{\s*(?P<den>-?\d+)\s*\}"
# not inside a word or another number (CO2, 1.2.3); a minus behind one of these is a subtraction
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])(?P<minus>[+-])\$?|(?<![A-Za-z_\d])(?<!\d\.))"
    rf"(?:(?:(?P<whole>\d+)\s*)?{_FRAC}|(?:(?P<mixed>\d+)\s+)?{_OVER}|(?P<plain>{_PLAIN}){_POWER}?)",
    re.ASCII,
)
_SAME = {
    **dict.fromkeys("\u2212\ufe63\uff0d\u2010\u2011\u2013", "-"),  # minus signs and dashes
    "\u2044": "/",
    "\xa0": " ",
    "\u202f": " ",
    "\\!": "",
    "\\,": "",
    "{,}": ",",
    "\\$": "$",
    "\\%": "%",
}


def numbers_in(text: str) -> list[Fraction]:
    """All numbers of a text, in order."""
    values = map(_value, _NUMBER.finditer(plain(text)))
    return [value for value in values if value is not None]


def first_number(text: str) -> Fraction | None:
    """The first number of a text; None: it has none."""
    return _first(_NUMBER.finditer(plain(text)))


def last_number(text: str) -> Fraction | None:
    """The last number of a text; None: it has none."""
    return _first(reversed(list(_NUMBER.finditer(plain(text)))))


def _first(matches: Iterable[re.Match[str]]) -> Fraction | None:
    values = map(_value, matches)
    return next((value for value in values if value is not None), None)


def number_of(text: str) -> Fraction | None:
    """The number that a text is, with currency or unit sign around it; None: it is no number."""
    bare = plain(text).strip().strip("$").strip().removesuffix(".").removesuffix("%").strip()
    bare = re.sub(r"^([+-])\s*\$", r"\1", bare)
    match = _NUMBER.fullmatch(bare)
    return None if match is None else _value(match)


def plain(text: str) -> str:
    """A text with one way of writing minus, thousands and spaces."""
    for written, same in _SAME.items():
        text = text.replace(written, same)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of a match; None where it is too long or divides by zero."""
    if len(match[0]) > MOST_DIGITS:
        return None
    sign = -1 if match["minus"] == "-" else 1
    if match["plain"] is not None:
        power = int(match["e"] or match["ten"] or 0)
        if abs(power) > MOST_DIGITS:
            return None
        return sign * Fraction(match["plain"].replace(",", "")) * Fraction(10) ** power
    top, bottom = (match["num"], match["den"]) if match["num"] else (match["top"], match["bottom"])
    if int(bottom) == 0:
        return None
    return sign * (int(match["whole"] or match["mixed"] or 0) + Fraction(int(top), int(bottom)))
