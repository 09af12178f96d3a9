"""Strings that end a turn because the task says so: a task that reads `</calc>` has to see it."""

from __future__ import annotations

from typing import Any

from mesh.config.user_code import call_user_code

ATTRIBUTE = "stop_strings"


def stop_strings(task: Any) -> tuple[str, ...]:
    """The task's `stop_strings`, which are added to generator.stop; none where it has none. Raises
    ValueError where they are no texts.
    """
    found = call_user_code(f"{ATTRIBUTE} of {task!r}", lambda: getattr(task, ATTRIBUTE, ()))
    if not isinstance(found, list | tuple) or not all(isinstance(s, str) and s for s in found):
        raise ValueError(
            f"the task's {ATTRIBUTE} is {found!r}; make it a list or tuple of texts, such as "
            '("</calc>",)'
        )
    return tuple(found)
