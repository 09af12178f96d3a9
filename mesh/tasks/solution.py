"""Solutions: what a policy that knows the answer says, turn by turn, with the replies between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.config.user_code import call_user_code
from mesh.tasks import Task
from mesh.tasks.replying import reply_of
from mesh.tasks.returned import Unusable
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import Unencodable
from mesh.types import Prompt, Reply, Turn, TurnText

FORM = (
    "return a text, or turns in order, each (text, True) for what the policy says and "
    "(reply, False) for what follows it, from (text, True) to (text, True)"
)


@dataclass(frozen=True)
class Solution:
    """A whole conversation after its prompt. replies[i] follows texts[i]; the last text ends it."""

    texts: tuple[str, ...]
    replies: tuple[Reply, ...] = ()


@dataclass(frozen=True)
class Taught:
    """The tokens after the prompt of a rollout whose policy says the solution, and their turns."""

    tokens: tuple[int, ...]
    turns: tuple[Turn, ...]


def taught(
    encoder: PromptEncoder, prompt: Prompt, solution: Solution, end: int, stops: Sequence[str]
) -> Taught:
    """The tokens of a solution as generation would have them.

    A sampled turn ends with one of the strings `stops` or else with the token `end`, and a reply is
    framed as in a rollout. Raises Unencodable where a turn goes on behind a stop string.
    """
    turns: list[TurnText] = []
    for text, reply in zip(solution.texts, (*solution.replies, None), strict=True):
        tokens = encoder.continuation(text)
        tokens = tokens if stopped(text, stops) else (*tokens, end)
        turns.append(TurnText(text, True, text, tokens, "stop"))
        if reply is not None:
            after = encoder.after(prompt, turns, reply)
            turns.append(TurnText(encoder.tokenizer.decode(after), False, tokens=after))
    return Taught(
        tuple(token for turn in turns for token in turn.tokens),
        tuple(Turn(len(turn.tokens), turn.sampled) for turn in turns) if turns[1:] else (),
    )


def stopped(text: str, stops: Sequence[str]) -> bool:
    """True if a stop string ends a turn; Unencodable where one is inside it."""
    for stop in stops:
        behind = text.partition(stop)[2]
        if behind:
            wrong = (
                f"the task's solution has the turn {text!r}, which goes on behind the stop string"
            )
            raise Unencodable(f"{wrong} {stop!r}, where generation ends", "cut it there")
    return text.endswith(tuple(stops))


def solution_of(task: Task, prompt: Prompt) -> Solution:
    """The task's solution; ValueError where it raises or has another form."""
    value = call_user_code(f"solution of {task!r}", lambda: task.solution(prompt))
    if isinstance(value, str):
        return Solution((value,))
    turns = _turns(value)
    texts = tuple(content for content, sampled in turns if sampled)
    replies = tuple(content for content, sampled in turns if not sampled)
    alternate = [sampled for _, sampled in turns] == [i % 2 == 0 for i in range(len(turns))]
    if not (alternate and len(turns) % 2 == 1 and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"the task's solution returned {value!r}; {FORM}")
    try:
        return Solution(texts, tuple(map(_reply, replies)))
    except Unusable as wrong:
        raise ValueError(f"the task's solution has a reply that cannot be used: {wrong}") from None


def _turns(value: Any) -> list[tuple[Any, bool]]:
    """(content, sampled) of each turn; none where the value is no sequence of turns."""
    if not isinstance(value, Sequence):
        return []
    pairs = [(t.text, t.sampled) if isinstance(t, TurnText) else t for t in value]
    fits = all(
        isinstance(p, tuple | list) and len(p) == 2 and isinstance(p[1], bool) for p in pairs
    )
    return [(p[0], p[1]) for p in pairs] if fits else []


def _reply(value: Any) -> Reply:
    if value is None:
        raise Unusable("returned None, which ends a conversation; leave out the turns behind it")
    return reply_of(value)
