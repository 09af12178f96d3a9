"""Conversations as users write them. No torch is imported here: scoring processes import it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.tasks.response import Response, Score
from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Message, Prompt, TurnText


@dataclass(frozen=True)
class Chatty(SpellBackward):
    """Answers whatever is said with letters that go by the seed, until the model has had `turns`
    turns; each reply takes `seconds`.
    """

    turns: int = 3
    seconds: float = 0.0

    def reply(self, prompt: Prompt, turns: Sequence[TurnText], seed: int) -> str | None:
        time.sleep(self.seconds)
        if sum(turn.sampled for turn in turns) == self.turns:
            return None
        return "".join(chr(ord("a") + seed // 26**i % 26) for i in range(seed % 5)) + ">"

    def score(self, prompt: Prompt, response: Response) -> Score:
        said = [turn.text for turn in response.turns if turn.sampled]
        return Score(len(set("".join(said))) / 26, {"said": float(len(said))})


@dataclass(frozen=True)
class Messages(SpellBackward):
    """Asks on in messages."""

    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> Message | None:
        return {"role": "user", "content": "again"} if len(turns) < 4 else None


@dataclass(frozen=True)
class Foreign(SpellBackward):
    """A reply that the tokenizer does not know."""

    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> str:
        return "\N{SNOWMAN}"


@dataclass(frozen=True)
class Hasty(SpellBackward):
    """Its reply and its score do with an empty answer what `replies` and `scores` say: `fail`,
    `number`, `mean`, or nothing wrong. It remembers how often it was asked.
    """

    replies: str = ""
    scores: str = ""
    asked: list[str] = field(default_factory=list, init=False, compare=False)

    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> Any:
        self.asked.append("reply")
        if turns[-1].text or not self.replies:
            return None
        return 5 if self.replies == "number" else {}["lost"]

    def score(self, prompt: Prompt, response: Response) -> Any:
        self.asked.append("score")
        if response or not self.scores:
            return 0.0
        if self.scores == "fail":
            raise ValueError("an answer\nis needed")
        return "5" if self.scores == "number" else Score(0.5, {self.scores: 1.0})


@dataclass(frozen=True)
class Controls(SpellBackward):
    """One reply, in which there is a control token where the prompt's number is odd."""

    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> str | None:
        return ("a<eos>" if prompt.prompt_id % 2 else "a>") if len(turns) == 1 else None
