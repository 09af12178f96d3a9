"""Prompts as the tokens that a model reads, whichever form a task gives them in.

Everything that shows a model a prompt asks the `PromptEncoder` of the plan: what is generated,
taught and checked are the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from mesh.text.few_shot import Shot, as_messages, as_text
from mesh.text.fidelity import control_ids
from mesh.text.forms import form_problem
from mesh.text.template import ChatTemplate
from mesh.text.tokenizer import Tokenizer, Unencodable
from mesh.text.turn import ANSWER, SOME_DAY
from mesh.types import Message, Prompt, Reply, TurnText

LEADING = ("system", "developer")
"""Roles of a message that comes before all others."""


@dataclass(frozen=True)
class PromptForm:
    """Additions of a run to its prompts: the keys `prompt.*`.

    begins: a beginning-of-sequence token is in front of every prompt (True) or of no plain text
    (False); None: of a text by the tokenizer's rule, of a chat by its template. day: the date that
    a template may write; arguments: what else it reads. prefix: directly in front of a question
    that is a text, behind the examples, whether it is a chat or not.
    """

    chat: bool = False
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    prefix: str = ""
    shots: tuple[Shot, ...] = ()
    begins: bool | None = None
    day: date = SOME_DAY


@dataclass(frozen=True)
class PromptEncoder:
    """A tokenizer with its chat template, and the form of a run's prompts."""

    tokenizer: Tokenizer
    form: PromptForm = field(default_factory=PromptForm)

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt, its prefill included. Raises Unencodable, which says why not."""
        if wrong := form_problem(prompt):
            raise Unencodable(wrong, "give it as one of the three")
        prefill = prompt.prefill or self.form.prefill
        if prompt.tokens:
            return (*self._known(prompt), *self.continuation(prefill))
        is_chat = bool(prompt.messages) or self.form.chat
        text = self.chat(prompt) if is_chat else self._plain(prompt)
        ids = tuple(self.tokenizer.encode(text + prefill))
        begins = self.form.begins or (self.form.begins is None and not is_chat)
        beginning = self.beginning if begins else ()
        return ids if ids[: len(beginning)] == beginning else (*beginning, *ids)

    def chat(self, prompt: Prompt) -> str:
        """The text of a prompt that is a chat, up to where its answer begins. An assistant's
        message at its end is the beginning of the answer.
        """
        messages = self.messages(prompt)
        if messages[-1].get("role") != "assistant":
            return self._rendered(messages, generation=True)
        chat = self._rendered([*messages[:-1], _answer(messages[-1], ANSWER)])
        text, mark, _ = chat.rpartition(ANSWER)
        if not mark:
            raise self._fault("it does not show the assistant's message at the end")
        return text

    def messages(self, prompt: Prompt) -> list[Message]:
        """The messages of a prompt that is a chat: the run's system message, unless it has its own,
        examples, and its own.
        """
        form = self.form
        question: Message = {"role": "user", "content": form.prefix + prompt.text}
        own = list(prompt.messages) or [question]
        leading = own[:1] if own[0].get("role") in LEADING else []
        system = [{"role": "system", "content": form.system}] if form.system is not None else []
        return [*(leading or system), *as_messages(form.shots), *own[len(leading) :]]

    def after(self, prompt: Prompt, turns: Sequence[TurnText], reply: Reply) -> tuple[int, ...]:
        """The tokens that follow the last turn, which was sampled, when `reply` is appended.

        A text is encoded as it is: the assistant's turn goes on. Messages get the framing of the
        chat template: what it writes between an answer and the beginning of the next, without the
        token that ends a turn where the answer has it already. No token before is changed, also
        where a template would rewrite earlier turns.
        """
        assert reply is not None, "the conversation is over"
        if isinstance(reply, str):
            return self.continuation(reply)
        replies = [reply] if isinstance(reply, Mapping) else list(reply)
        asked = self.messages(prompt)
        asked = asked[:-1] if asked[-1].get("role") == "assistant" else asked
        answer = {"role": "assistant", "content": ANSWER}
        chat = self._rendered([*asked, answer, *replies], generation=True)
        _, mark, rest = chat.rpartition(ANSWER)
        if not mark:
            raise self._fault("it does not show the answer of an assistant")
        last = turns[-1].tokens[-1:] if turns else ()
        end = self.tokenizer.decode(last) if last and last[0] in self.tokenizer.eos_ids else ""
        if end and rest.lstrip().startswith(end):
            rest = rest.lstrip().removeprefix(end)
        return self.continuation(rest)

    def continuation(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that continues another: without the space that some tokenizers put in
        front of a first word."""
        if not text:
            return ()
        if self._mark:
            marked = tuple(self.tokenizer.encode("\n" + text))
            if marked[: len(self._mark)] == self._mark:
                return marked[len(self._mark) :]
        return tuple(self.tokenizer.encode(text))

    def control_in(self, text: str) -> str | None:
        """The first control token that a text encodes to, where its characters were to be; None:
        there is none.
        """
        if not any(token in text for token in self._controls.values()):
            return None
        found = (self._controls.get(token_id) for token_id in self.tokenizer.encode(text))
        return next((token for token in found if token is not None), None)

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """Tokens in front of a text: by the tokenizer's own rule, else, where the run asks for
        a beginning (form.begins), the beginning-of-sequence token.
        """
        rule = self.tokenizer.beginning
        bos = self.tokenizer.bos_id
        return rule or ((bos,) if self.form.begins and bos is not None else ())

    @cached_property
    def _controls(self) -> dict[int, str]:
        tokens = self.tokenizer.backend.get_added_tokens_decoder()
        return {i: tokens[i].content for i in control_ids(self.tokenizer)}

    @cached_property
    def _mark(self) -> tuple[int, ...]:
        """A first token that keeps a text behind it from being the first word; none needed: ()."""
        encode, decode = self.tokenizer.encode, self.tokenizer.backend.id_to_token
        first = encode("a") if self.tokenizer.backend.encode("a").ids else []
        puts_space = bool(first) and str(decode(first[0])).startswith("▁")
        return tuple(encode("\n")) if puts_space else ()

    def _known(self, prompt: Prompt) -> tuple[int, ...]:
        ids = tuple(map(int, prompt.tokens))
        if unknown := [token_id for token_id in ids if not self.tokenizer.has(token_id)]:
            wrong = f"the prompt {prompt.question[:200]!r} has the token id {unknown[0]}"
            where = f"the tokenizer in {self.tokenizer.directory}"
            raise Unencodable(f"{wrong}, which {where} does not have", "correct it")
        return ids

    def _plain(self, prompt: Prompt) -> str:
        form = self.form
        unread = [
            name
            for name, value in (("system", form.system), ("template_args", form.arguments))
            if value not in (None, {})
        ]
        if unread:
            wrong = f"the prompt {prompt.text[:200]!r} is plain text, which has no part for"
            raise Unencodable(
                f"{wrong} prompt.{unread[0]}",
                f"set prompt.chat=true, or leave out prompt.{unread[0]}",
            )
        return as_text(form.shots) + form.prefix + prompt.text

    def _rendered(self, messages: Sequence[Message], generation: bool = False) -> str:
        template, form = self._template(), self.form
        try:
            return template.render(messages, form.day, generation, form.arguments)
        except ValueError as error:
            raise self._fault(
                f"it fails on these messages: {error}; they are {list(messages)!r:.300}"
            ) from error

    def _template(self) -> ChatTemplate:
        tokenizer = self.tokenizer
        if tokenizer.template is not None:
            return tokenizer.template
        if tokenizer.template_problem:
            raise self._fault(tokenizer.template_problem)
        raise Unencodable(
            f"the tokenizer in {tokenizer.directory} has no chat template, and the prompt is a "
            "chat",
            "add chat_template.jinja to that directory, or give prompts as plain text",
        )

    def _fault(self, wrong: str) -> Unencodable:
        where = f"the chat template in {self.tokenizer.directory}"
        return Unencodable(f"{where}: {wrong}", "correct the messages or the template")


def _answer(message: Message, mark: str) -> Message:
    """The message with a mark at its end, or behind the last text of its parts."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + mark}
    parts = [dict(part) for part in content or ()]
    last = next((part for part in reversed(parts) if "text" in part), None)
    if last is None:
        raise Unencodable("an assistant's message at the end of a prompt has no text", "add one")
    last["text"] += mark
    return {**message, "content": parts}
