"""JSON files that others wrote: a message about one names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError that names the file and says what is wrong."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        return object_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from error


def object_of(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError that continues "FILE ..."."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value
