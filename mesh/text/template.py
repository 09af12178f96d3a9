"""Chat templates: the messages of a conversation as the text that a model was trained to read.

A template of the tokenizer's directory is rendered as `transformers` does it
(`utils/chat_template_utils.py`), in jinja2's sandbox, which lets it call nothing of Python's. The
date, which some templates write, is an argument here: two runs of one day, or a run and its
resumption on the next, read the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mesh.config.user_code import call_user_code
from mesh.types import Message

TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
FOR_TOOLS = "tool_use"  # the name of a template
GIVEN = ("messages", "add_generation_prompt", "strftime_now", "raise_exception")
"""Names in a template that are no arguments of a user's."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may write, by their names in it. with_tools:
    the one that is for chats with tools, where there is one.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    with_tools: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        day: date,
        generation: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the messages, as of a day. generation: with the beginning of an answer;
        arguments: what else the template reads. ValueError with the template's error.
        """
        values: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        values |= {"tools": None, "documents": None, "add_generation_prompt": generation}
        values |= {"strftime_now": datetime.combine(day, time()).strftime}
        values |= {**self.tokens, **(arguments or {})}
        for_tools = self.with_tools is not None and values["tools"] is not None
        source = self.with_tools if for_tools else self.source
        return call_user_code("the template", lambda: _rendered(str(source), values))

    @property
    def reads_date(self) -> bool:
        """True if it may write the date of the day."""
        return any("strftime_now" in (source or "") for source in (self.source, self.with_tools))


def read_template(directory: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a tokenizer's directory; None: it has none. ValueError where it is no text.

    settings: of tokenizer_config.json.
    """
    sources = _sources_of(directory, settings)
    if not sources:
        return None
    if "default" not in sources:
        raise ValueError(f"of the templates {', '.join(sources)} none is called default")
    if not isinstance(sources["default"], str):
        raise ValueError("the chat_template is not a text")
    return ChatTemplate(sources["default"], special_tokens(settings), sources.get(FOR_TOOLS))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, image_token and the like, as tokenizer_config.json names them."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class Generation(Extension):
    """{% generation %}, which marks what the assistant says, and changes no text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # what is set in it is not set behind it


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


def _rendered(source: str, values: Mapping[str, Any]) -> str:
    try:
        return _compiled(source).render(values)
    except jinja2.TemplateError as error:  # whose place is in the template, not in a Python file
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _sources_of(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Templates by name: the file and the folder beside it, else the entry of
    tokenizer_config.json: a text, or several with a name each.
    """
    file, entry = directory / TEMPLATE_FILE, settings.get("chat_template")
    files = {"default": file} if file.is_file() else {}
    files |= {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if entry is None:
        return {}
    named = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
    if not all(isinstance(one, dict) for one in named):
        raise ValueError("chat_template is neither a text nor a list of named templates")
    return {str(one.get("name")): one.get("template") for one in named}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
