"""The forms in which a prompt is given: a text, messages or token ids, and one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mesh.types import Prompt


def form_problem(prompt: Prompt) -> str | None:
    """The problem with the form of a prompt, which is one of text, messages and tokens."""
    messages, tokens = prompt.messages, prompt.tokens
    if messages != () and (wrong := messages_problem(messages)):
        return f"the messages {messages!r:.200} of a prompt: it {wrong}"
    if not isinstance(tokens, Sequence) or not all(hasattr(i, "__index__") for i in tokens):
        return f"the tokens {tokens!r:.200} of a prompt, which are no ids"
    if not isinstance(prompt.prefill, str):
        return f"the prefill {prompt.prefill!r:.200} of a prompt, which is no text"
    given = [name for name in ("text", "messages", "tokens") if len(getattr(prompt, name))]
    if len(given) == 1:
        return None
    shown = " and ".join(given) if given else "neither text nor messages nor tokens"
    return f"the prompt {prompt.question[:200]!r} has {shown}"


def messages_problem(value: Any) -> str | None:
    """The reason why a value is not the messages of a chat; None: it is."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return "is no list of messages"
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"has {message!r:.200} at index {index}, which is no message with a role"
    return None
