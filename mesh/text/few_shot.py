"""Examples that stand before every prompt, from a JSON Lines file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.text.forms import messages_problem
from mesh.text.lines import json_line, numbered_lines
from mesh.text.tokenizer import Unencodable
from mesh.types import Message

ROW = 'write {"question": "...", "answer": "..."} or {"messages": [...]}'


@dataclass(frozen=True)
class Shot:
    """One example: a question and its answer, or messages."""

    question: str = ""
    answer: str = ""
    messages: tuple[Message, ...] = ()


def read_shots(path: Path) -> tuple[Shot, ...]:
    """The examples of a file, in order. ValueError naming the line that is none."""
    return tuple(_shot(number, line) for number, line in numbered_lines(path))


def as_text(shots: Sequence[Shot]) -> str:
    """Each question followed by its answer and a line break. Raises Unencodable for messages."""
    for shot in shots:
        if shot.messages:
            wrong = "prompt.few_shot has messages, and a prompt that is plain text cannot"
            raise Unencodable(f"{wrong} follow them", "set prompt.chat=true, or give questions")
    return "".join(f"{shot.question}{shot.answer}\n" for shot in shots)


def as_messages(shots: Sequence[Shot]) -> list[Message]:
    """Each as a user's message and the assistant's, or as its own."""
    found: list[Message] = []
    for shot in shots:
        pair = [("user", shot.question), ("assistant", shot.answer)]
        found += shot.messages or [{"role": role, "content": text} for role, text in pair]
    return found


def _shot(number: int, line: str) -> Shot:
    row = json_line(number, line, ROW)
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object; {ROW}")
    if "messages" in row:
        if wrong := messages_problem(row["messages"]):
            raise ValueError(f"line {number}: messages {wrong}; {ROW}")
        return Shot(messages=tuple(row["messages"]))
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"line {number} has no text {name}; {ROW}")
    return Shot(row["question"], row["answer"])
