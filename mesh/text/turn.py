"""The token with which the chat template of a tokenizer's directory ends an assistant's turn.

A chat model has learnt to stop there, which need not be the tokenizer's eos_token: a Qwen3 ends a
turn with <|im_end|>, and a text with <|endoftext|>. The template is rendered for a question and an
answer, as `transformers` does (`utils/chat_template_utils.py`): in jinja2's sandbox, which lets a
template call nothing of Python's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from mesh.config.user_code import call_user_code

ANSWER = "a8c1e5-answer"  # in no template
CHAT = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
TEMPLATE_FILE = "chat_template.jinja"


def turn_end(
    directory: Path, settings: Mapping[str, Any], backend: Backend, known_ends: Collection[int]
) -> int | None:
    """The id of the special token that follows an answer; None where there is no template, or none
    follows.

    settings: of tokenizer_config.json; known_ends: ids that count although they are not special.
    Raises ValueError for a template that cannot be rendered.
    """
    template = _template_of(directory, settings)
    if template is None:
        return None
    chat = call_user_code("the template", lambda: render(template, special_tokens(settings)))
    rest = chat[chat.rindex(ANSWER) + len(ANSWER) :].lstrip() if ANSWER in chat else ""
    ends = {
        token.content: token_id
        for token_id, token in backend.get_added_tokens_decoder().items()
        if rest.startswith(token.content) and (token.special or token_id in known_ends)
    }
    return ends[max(ends, key=len)] if ends else None


def render(template: str, tokens: Mapping[str, str]) -> str:
    """The chat of a question and an answer. tokens: special ones, by their names in a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": datetime.now().strftime}
    try:
        return environment.from_string(template).render(
            messages=CHAT, tools=None, documents=None, add_generation_prompt=False, **tokens
        )
    except jinja2.TemplateError as error:  # whose place is in the template, not in a Python file
        raise ValueError(f"{type(error).__name__}: {error}") from error


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, as tokenizer_config.json names them."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class Generation(Extension):
    """{% generation %}, which marks what the assistant says, and changes no text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_of(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The file, else the entry of tokenizer_config.json: a text, or several with a name each."""
    file, entry = directory / TEMPLATE_FILE, settings.get("chat_template")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if entry is None:
        return None
    named = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
    if not all(isinstance(one, dict) for one in named):
        raise ValueError("chat_template is neither a text nor a list of named templates")
    templates = {str(one.get("name")): one.get("template") for one in named}
    if "default" not in templates:
        raise ValueError(f"of the templates {', '.join(templates)} none is called default")
    if not isinstance(templates["default"], str):
        raise ValueError("the chat_template is not a text")
    return templates["default"]


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
