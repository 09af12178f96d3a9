"""What a task asks, and what is said in answer: prompts, turns and replies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.types.rollouts import FinishReason

Message = Mapping[str, Any]
"""A chat message as chat templates read it: `role`, `content`, and what else a template knows."""


@dataclass(frozen=True)
class Prompt:
    """One question of a task. `prompt_id` is the task's own number of it: any integer, each once in
    a call of the task. `score`, `reply` and `solution` get the prompt as it is; `answer` is for
    them, and so is `info`, of JSON values.

    It is given as one of three: `text`, `messages`, which go through the chat template, or
    `tokens`, which reach the model as they are; `text` is "" beside the other two. `prefill` begins
    the answer: the model continues it, and it carries no loss.
    """

    prompt_id: int
    text: str
    answer: str
    messages: Sequence[Message] = field(default=(), kw_only=True)
    tokens: Sequence[int] = field(default=(), kw_only=True)
    prefill: str = field(default="", kw_only=True)
    info: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def question(self) -> str:
        """The prompt as one text: what is shown, and what two equal prompts have in common."""
        if self.messages:
            shown = json.dumps([dict(message) for message in self.messages], ensure_ascii=False)
        else:
            shown = json.dumps(list(self.tokens)) if self.tokens else self.text
        return shown + self.prefill


@dataclass(frozen=True)
class TurnText:
    """One turn of a conversation after its prompt: sampled by the policy, or written by `reply`.

    text: of all its tokens but the stop token that ended it; plain: without special tokens.
    finish_reason: of a sampled turn.
    """

    text: str
    sampled: bool
    plain: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


Reply = str | Message | Sequence[Message] | None
"""What `reply` may return: a text, which is appended as it is; a message or several, which go
through the chat template; None: the conversation is over."""


@dataclass(frozen=True)
class NumberedPrompt:
    """A prompt and its place in the step, counted from 0. The place is the `prompt_id` of every
    other noun here, of logs and of messages.
    """

    prompt_id: int
    prompt: Prompt

    @property
    def text(self) -> str:
        """The prompt as one text, to show it."""
        return self.prompt.question
