"""Lines of JSON: how a log writes them, and how they are read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


def line_of(record: Line) -> str:
    """A line of a log, without its newline. NaN and infinities, which JSON lacks, are null; half of
    a surrogate pair, which no file in UTF-8 can hold, is U+FFFD."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # another kind of number, or one that JSON lacks
        text = json.dumps(as_json(record), ensure_ascii=False, allow_nan=False)
    return encodable(text)


def encodable(text: str) -> str:
    """The text, with pairs of surrogates as the character that they mean and halves as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def as_json(value: Any) -> Any:
    """`value` with null for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    value = plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> Any:
    """A Python number of a tensor or numpy scalar."""
    return value.item() if hasattr(value, "item") else value


def read_lines(path: Path, killed: bool = False) -> list[dict[str, Any]]:
    """Read a file of JSON lines. Raises ValueError naming the file and the line.

    `killed`: ignore a truncated last line.
    """
    return lines_in(bytes_of(path), path, killed)


def bytes_of(path: Path) -> bytes:
    """The bytes of a run's file. Raises ValueError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name the directory of a run") from error


def lines_in(data: bytes, path: Path, killed: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file's content, as `read_lines` reads it."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if killed and not line.endswith(b"\n"):
            return found
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not line.endswith(b"\n"):
            remedy = "a killed run may leave a truncated one, which resume= removes"
            raise ValueError(f"{path}: line {number} is not a complete JSON object; {remedy}")
        found.append(record)
    return found
