"""The environment of `conversation.py`: a task whose replies take their time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt, TurnText


@dataclass(frozen=True)
class SlowReply(SpellBackward):
    """Replies of `length` characters, each after `seconds`, until there were `turns` turns."""

    turns: int = 4
    length: int = 8
    seconds: float = 0.0

    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> str | None:
        if sum(turn.sampled for turn in turns) == self.turns:
            return None
        time.sleep(self.seconds)
        return "x" * self.length
