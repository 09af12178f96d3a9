"""Responses as a task sees them, and what its `score` may return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.types import FinishReason, TurnText


class Response(str):
    """The answer of the policy. As a string it is the text of its last turn: all tokens but the
    stop token that ended it, special tokens included.

    plain: that text without special tokens; tokens: of that turn, the stop token included;
    finish_reason: of the rollout; turns: the whole conversation after the prompt, in order. Where
    there is one turn, it is that one.
    """

    plain: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    turns: tuple[TurnText, ...]

    def __new__(
        cls,
        text: str,
        plain: str | None = None,
        tokens: Sequence[int] = (),
        finish_reason: FinishReason = "stop",
        turns: Sequence[TurnText] = (),
    ) -> Response:
        self = super().__new__(cls, text)
        self.plain = text if plain is None else plain
        self.tokens, self.finish_reason = tuple(tokens), finish_reason
        one = TurnText(text, True, self.plain, self.tokens, finish_reason)
        self.turns = tuple(turns) or (one,)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Its arguments, each text once: responses are sent to the processes that score."""
        one = TurnText(self, True, self.plain, self.tokens, self.finish_reason)
        plain = None if self.plain == self else self.plain
        turns = () if self.turns == (one,) else self.turns
        return Response, (self.text, plain, self.tokens, self.finish_reason, turns)

    @property
    def text(self) -> str:
        """The string itself, as a plain `str`."""
        return str(self)

    @property
    def transcript(self) -> str:
        """The texts of all turns, one after the other."""
        return "".join(turn.text for turn in self.turns)


@dataclass(frozen=True)
class Score:
    """A reward with what is known of it. parts: each becomes the metric `reward/NAME`; correct:
    what an evaluation counts, None: the task's `is_correct`, or else a reward of 1; answer: what
    the response says, for the vote of majority@k, "": nothing, None: the response itself.
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    correct: bool | None = None
    answer: str | None = None
