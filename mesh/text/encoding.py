"""Prompts as the tokens that a model reads, whichever form a task gives them in.

Everything that shows a model a prompt asks the `PromptEncoder` of the plan: what is generated,
taught and checked are the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from mesh.text.template import ChatTemplate
from mesh.text.tokenizer import Tokenizer, Unencodable
from mesh.text.turn import ANSWER, SOME_DAY
from mesh.types import Message, Prompt, Reply, TurnText


@dataclass(frozen=True)
class PromptEncoder:
    """A tokenizer and its chat template. day: the date that a template may write."""

    tokenizer: Tokenizer
    day: date = SOME_DAY

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt, its prefill included. Raises Unencodable, which says why not."""
        if wrong := form_problem(prompt):
            raise Unencodable(wrong, "give it as one of the three")
        encode = self.tokenizer.encode
        if prompt.tokens:
            return (*map(int, prompt.tokens), *self.continuation(prompt.prefill))
        if prompt.messages:
            return tuple(encode(self._rendered(prompt.messages, generation=True) + prompt.prefill))
        return tuple(encode(prompt.text + prompt.prefill))

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
        messages = [reply] if isinstance(reply, dict) else list(reply)  # type: ignore[arg-type]
        question = list(prompt.messages) or [{"role": "user", "content": prompt.question}]
        answer = {"role": "assistant", "content": ANSWER}
        chat = self._rendered([*question, answer, *messages], generation=True)
        if ANSWER not in chat:
            raise self._fault("it does not show the answer of an assistant")
        rest = chat[chat.rindex(ANSWER) + len(ANSWER) :]
        last = turns[-1].tokens[-1:] if turns else ()
        end = self.tokenizer.decode(last) if last and last[0] in self.tokenizer.eos_ids else ""
        if end and rest.lstrip().startswith(end):
            rest = rest.lstrip().removeprefix(end)
        return self.continuation(rest)

    def _rendered(self, messages: Sequence[Message], generation: bool) -> str:
        try:
            return self._template().render(messages, self.day, generation)
        except ValueError as error:
            raise self._fault(f"it fails on these messages: {error}") from error

    def _template(self) -> ChatTemplate:
        tokenizer = self.tokenizer
        if tokenizer.template_problem:
            raise self._fault(tokenizer.template_problem)
        if tokenizer.template is None:
            raise Unencodable(
                f"the tokenizer in {tokenizer.directory} has no chat template for messages",
                "add chat_template.jinja to it, or give prompts as text",
            )
        return tokenizer.template

    def _fault(self, wrong: str) -> Unencodable:
        return Unencodable(f"the chat template in {self.tokenizer.directory}: {wrong}",
                           "correct the messages or the template")  # fmt: skip

    def continuation(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that continues another: without the space that some tokenizers put in
        front of a first word."""
        if not text:
            return ()
        ids = self.tokenizer.encode(text)
        mark = self.tokenizer.encode("\n")
        marked = self.tokenizer.encode("\n" + text)
        prepends = len(self.tokenizer.decode(self.tokenizer.encode("a"))) > 1
        return tuple(marked[len(mark) :] if prepends and marked[: len(mark)] == mark else ids)


def form_problem(prompt: Prompt) -> str | None:
    """What is wrong with the form of a prompt: it is one of text, messages and tokens."""
    given = [name for name in ("text", "messages", "tokens") if len(getattr(prompt, name))]
    if len(given) == 1:
        return None
    shown = " and ".join(given) if given else "neither text nor messages nor tokens"
    return f"the prompt {prompt.question[:200]!r} has {shown}"
