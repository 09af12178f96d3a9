"""From a row of a data set to a prompt: which columns are its question, its answer and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any

from mesh.config.spelling import meant
from mesh.tasks.rows import Row, kind_of
from mesh.types import Prompt


@dataclass(frozen=True)
class RowPrompt(Prompt):
    """The prompt of a row. place: of the row, as messages name it; teaches: a right response."""

    place: str = field(default="", kw_only=True)
    teaches: str = field(default="", kw_only=True)


KEYS = {"solution": "solution_column"}
"""Keys of `task_args` that have another name than the field here."""


class UnusableRow(ValueError):
    """A row that gives no prompt; the message has its column."""


@dataclass(frozen=True)
class Columns:
    """Names of columns, "" for none. The question is `template` filled in, else the text of the
    column `prompt`, else the chat of the column `messages`, whose last message, if an assistant
    wrote it, is the solution. With a column `system` the question is a user's message behind it.
    """

    prompt: str = ""
    messages: str = ""
    template: str = ""
    system: str = ""
    answer: str = ""
    solution: str = ""
    info: tuple[str, ...] = ()

    @property
    def fields(self) -> list[str]:
        """The columns of the template, in order."""
        parts = Formatter().parse(self.template)
        return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))

    def used(self) -> dict[str, list[str]]:
        """The columns that each key names."""
        keys = ("prompt", "messages", "system", "answer", "solution")
        named = {key: [getattr(self, key)] for key in keys if getattr(self, key)}
        return {**named, "template": self.fields, "info": list(self.info)}

    def among(self, names: Sequence[str]) -> Columns:
        """With the columns `prompt` or `messages` and `answer`, where they are there and no other
        ones are named."""
        found = self
        if not (self.prompt or self.messages or self.template):
            if "prompt" in names:
                found = replace(found, prompt="prompt")
            elif "messages" in names:
                found = replace(found, messages="messages")
        if not self.answer and "answer" in names:
            found = replace(found, answer="answer")
        return found

    def problems(self, names: Sequence[str]) -> list[str]:
        """Keys that name no column of these, or do not go together."""
        has = f"the columns are {', '.join(names)}"
        found = []
        for key, columns in self.used().items():
            for column in columns:
                if column not in names:
                    where = f"{{{column}}} in task_args.template"
                    where = (
                        where if key == "template" else f"task_args.{KEYS.get(key, key)}={column}"
                    )
                    found.append(f"{where}: there is no such column; {meant(column, names)}{has}")
        questions = [key for key in ("prompt", "messages", "template") if getattr(self, key)]
        if not questions:
            found.append(
                "task_args.prompt is not set, and there is no column prompt or messages; name the "
                f"column of the question, or give task_args.template; {has}"
            )
        if len(questions) > 1:
            both = " and ".join(f"task_args.{key}" for key in questions)
            found.append(f"{both} are given, and the question comes from one; leave out the others")
        if not self.answer and not self.messages:
            found.append(f"task_args.answer is not set, and there is no column answer; {has}")
        return found

    def prompt_of(self, row: Row, place: str, prompt_id: int) -> RowPrompt:
        """The prompt of a row. Raises UnusableRow naming the column that has no such value."""
        info = {name: self._value(row, name) for name in self.info}
        if self.messages:
            messages, teaches = _chat(self.messages, self._value(row, self.messages))
            text = ""
        else:
            text, messages, teaches = self._question(row), [], ""
            if self.system:
                messages, text = [{"role": "user", "content": text}], ""
        if self.system:
            messages = [{"role": "system", "content": self._text(row, self.system)}, *messages]
        answer = self._scalar(row, self.answer) if self.answer else teaches
        if self.solution:
            teaches = self._text(row, self.solution)
        if not answer and not self.answer:
            raise UnusableRow(
                f"column {self.messages}: its last message is not an assistant's, and "
                "task_args.answer names no column"
            )
        return RowPrompt(
            prompt_id, text, answer, messages=tuple(messages), info=info, place=place,
            teaches=teaches or answer,
        )  # fmt: skip

    def _question(self, row: Row) -> str:
        if not self.template:
            return self._text(row, self.prompt)
        return self.template.format(**{name: self._scalar(row, name) for name in self.fields})

    def _value(self, row: Row, column: str) -> Any:
        if row.get(column) is None:
            raise UnusableRow(
                f"column {column}: {'it is null' if column in row else 'it is missing'}"
            )
        return row[column]

    def _text(self, row: Row, column: str) -> str:
        value = self._value(row, column)
        if not isinstance(value, str):
            lists = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
            hint = f"; a chat is named by task_args.messages={column}" if lists else ""
            raise UnusableRow(f"column {column}: it is {kind_of(value)}, not a text{hint}")
        if not value.strip():
            raise UnusableRow(f"column {column}: it is empty")
        return _encodable(column, value)

    def _scalar(self, row: Row, column: str) -> str:
        """A text or a number as text: 72 is `72`."""
        value = self._value(row, column)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UnusableRow(f"column {column}: it is {kind_of(value)}, not a text or a number")
        return _encodable(column, value) if isinstance(value, str) else str(value)


def template_problems(template: str) -> list[str]:
    """A template that is none, or that asks for more than columns."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        wrong = f"{error}; a brace that is meant is written twice, {{{{ or }}}}"
        return [f"task_args.template={template!r}: {wrong}"]
    names = [name for _, name, _, _ in parts if name is not None]
    odd = [
        name
        for _, name, form, conversion in parts
        if name is not None and (form or conversion or not name or set(".[]") & set(name))
    ]
    if odd:
        wrong = "write columns as {name} alone, and a brace that is meant twice"
        return [f"task_args.template={template!r}: {wrong}"]
    if "\\n" in template:
        wrong = "\\n is no line end here; write it in double quotes, as in"
        return [f"task_args.template={template!r}: {wrong} 'task_args.template=\"Q: {{q}}\\nA:\"'"]
    return [] if names else [f"task_args.template={template!r}: it names no {{column}}; name one"]


def _chat(column: str, value: Any) -> tuple[list[Any], str]:
    """(the messages of a prompt, the assistant's last one as a text, which is not among them)."""
    if not isinstance(value, list) or not value:
        raise UnusableRow(f"column {column}: it is {kind_of(value)}, not a list of messages")
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UnusableRow(
                f"column {column}: message {number} is no object with role and content"
            )
        if not isinstance(message.get("content"), str | list):
            kind = kind_of(message.get("content"))
            raise UnusableRow(
                f"column {column}: the content of message {number} is {kind}, not a text"
            )
        if isinstance(message["content"], str):
            _encodable(column, message["content"])
    *before, last = value
    if last["role"] != "assistant":
        return list(value), ""
    if not before:
        raise UnusableRow(f"column {column}: an assistant's message is all there is")
    return before, last["content"] if isinstance(last["content"], str) else ""


def _encodable(column: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"{text[error.start]!r} at {error.start} is half a character (a lone surrogate)"
        raise UnusableRow(f"column {column}: {wrong}") from error
    return text
