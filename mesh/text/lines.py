"""Lines of a user's file, by their numbers, and the JSON that one holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. ValueError where there is none.

    Only a line break ends a line: U+2028 and its like may stand in a JSON text.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError("has no line")
    return numbered


def json_line(number: int, line: str, remedy: str) -> Any:
    """The JSON value of a line; ValueError naming the line that is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        wrong = f"is no JSON ({error.msg} at column {error.colno})"
        raise ValueError(f"line {number} {wrong}; {remedy}") from error
