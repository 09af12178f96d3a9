"""What a task's `reply` takes and may return, as plain JSON values."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mesh.tasks.returned import Unusable, shown
from mesh.types import Message, Reply

METHOD = "reply"
FORMS = "a reply is a text, a message, several messages, or None, which ends the conversation"


def converses(task: Any) -> bool:
    """True if the task's questions are conversations."""
    return hasattr(task, METHOD)


def seed_of(task: Any, seed: int) -> dict[str, int]:
    """The seed as the task's `reply` takes it; nothing where it has no such parameter."""
    parameters = inspect.signature(task.reply).parameters.values()
    takes = any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"seed": seed} if takes else {}


def signature_problem(task: Any) -> str:
    """The problem with the parameters of the task's `reply`, if it has one; else ""."""
    if not converses(task):
        return ""
    try:
        inspect.signature(task.reply).bind((), (), **seed_of(task, 0))
    except TypeError as error:
        return (
            f"its method {METHOD} cannot be called as {METHOD}(prompt, turns), nor with seed=... "
            f"({error}); give it these parameters"
        )
    return ""


def reply_of(value: Any) -> Reply:
    """The reply that a task returned, of plain values. Raises Unusable for anything that is none
    of `Reply`, and for a text that UTF-8 cannot hold.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _text_of(value)
    if isinstance(value, Mapping):
        return _message_of(value)
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray | memoryview):
        raise Unusable(f"{shown(value)}, which is no text; {FORMS}")
    if not value:
        raise Unusable(f"{shown(value)}, which holds no message; {FORMS}")
    if wrong := [one for one in value if not isinstance(one, Mapping)]:
        raise Unusable(f"{shown(value)}, in which {wrong[0]!r} is no message; {FORMS}")
    return [_message_of(one) for one in value]


def _text_of(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{shown(text)}, which is no text that UTF-8 can hold ({error})") from None
    return str(text)


def _message_of(message: Mapping[Any, Any]) -> Message:
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise Unusable(
                f"{shown(dict(message))}, a message whose {name} is no text: "
                f"{message.get(name)!r}; a message is {{'role': 'tool', 'content': '84'}}"
            )
    try:
        plain = json.dumps(dict(message), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Unusable(f"{shown(dict(message))}, which JSON cannot hold ({error})") from None
    return dict(json.loads(_text_of(plain)))
