"""Conversations as users write them. No torch is imported here: scoring processes import it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

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
