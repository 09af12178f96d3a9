"""Prompts from a file: JSON Lines with a column of texts, messages or token ids, or plain lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh.text.forms import messages_problem
from mesh.text.lines import json_line, numbered_lines
from mesh.types import Prompt

JSON_LINES = (".jsonl", ".json", ".ndjson")
ROW = 'write {"prompt": "..."}, {"messages": [...]} or {"tokens": [...]}'


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order. ValueError naming the line that is none."""
    rows = numbered_lines(path)
    if path.suffix not in JSON_LINES:
        return [Prompt(i, line, "") for i, (_, line) in enumerate(rows)]
    return [_prompt(i, number, line) for i, (number, line) in enumerate(rows)]


def _prompt(index: int, number: int, line: str) -> Prompt:
    row = json_line(number, line, ROW)
    names = [name for name in ("prompt", "text", "messages", "tokens") if _has(row, name)]
    if len(names) != 1:
        found = f"has {' and '.join(names)}" if names else "has none of these columns"
        raise ValueError(f"line {number} {found}; {ROW}")
    value, more = row[names[0]], _more(row, number)
    answer = more.pop("answer")
    if names[0] == "messages":
        if wrong := messages_problem(value):
            raise ValueError(f"line {number}: messages {wrong}; {ROW}")
        return Prompt(index, "", answer, messages=value, **more)
    if names[0] == "tokens":
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise ValueError(f"line {number}: tokens are no list of ids; {ROW}")
        return Prompt(index, "", answer, tokens=value, **more)
    if not isinstance(value, str):
        raise ValueError(f"line {number}: the {names[0]} {value!r} is no text; {ROW}")
    return Prompt(index, value, answer, **more)


def _has(row: Any, name: str) -> bool:
    return isinstance(row, dict) and bool(row.get(name))


def _more(row: dict[str, Any], number: int) -> dict[str, Any]:
    """What a row may have beside its prompt. A column `answer` or `info` of another kind than a
    prompt's is not for `reply`, its only reader.
    """
    prefill, answer, info = row.get("prefill") or "", row.get("answer", ""), row.get("info")
    if not isinstance(prefill, str):
        raise ValueError(f"line {number}: the prefill {prefill!r} is no text")
    answer = str(answer) if isinstance(answer, str | int | float) else ""
    return {"prefill": prefill, "answer": answer, "info": info if isinstance(info, dict) else {}}
