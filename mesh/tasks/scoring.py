"""Outcome of one call of a task's `score` or `reply`, in any process: what it returned, checked, or
a problem.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mesh.tasks.replying import reply_of, seed_of
from mesh.tasks.response import Response, Score
from mesh.tasks.returned import Unusable, score_of
from mesh.types import Prompt, Reply, TurnText

MAX_DETAIL = 20_000  # characters kept of a traceback, from its end
NO_SCORE = Score(0.0, answer="")  # has no vote
TITLES = {"score": "the score function of", "reply": "the reply function of"}


@dataclass(frozen=True)
class Outcome:
    """A score or a reply; or a `problem`: what the task's method did, with its traceback or stack
    (`detail`) and, if raised in this process, the exception. returned: the problem is what it
    returned.
    """

    score: Score = NO_SCORE
    reply: Reply = None
    problem: str = ""
    returned: bool = False
    detail: str = ""
    error: BaseException | None = None


def score_outcome(task: Any, prompt: Prompt, response: Response) -> Outcome:
    """Call `task.score`. What is no reward is a problem: a made-up one would be trained on
    unnoticed.
    """
    return _outcome("score", score_of, task.score, prompt, response)


def reply_outcome(task: Any, prompt: Prompt, turns: Sequence[TurnText], seed: int) -> Outcome:
    """Call `task.reply`, with the seed if it takes one."""
    return _outcome("reply", reply_of, task.reply, prompt, turns, **seed_of(task, seed))


OUTCOMES: dict[str, Callable[..., Outcome]] = {"score": score_outcome, "reply": reply_outcome}
"""By the method of the task that a job calls."""


def _outcome(
    field: str, check: Callable[[Any], Any], method: Callable[..., Any], *args: Any, **more: Any
) -> Outcome:
    try:
        found: dict[str, Any] = {field: check(method(*args, **more))}
        return Outcome(**found)
    except Unusable as wrong:
        return Outcome(problem=str(wrong), returned=True)
    except (Exception, SystemExit) as error:  # user code may raise anything
        inside = error.__traceback__.tb_next if error.__traceback__ else None
        lines = traceback.format_exception(type(error), error, inside)
        problem = f"raised {type(error).__name__}: {error}"
        return Outcome(problem=problem, detail="".join(lines)[-MAX_DETAIL:], error=error)


def as_message(outcome: Outcome, seconds: float) -> bytes:
    """Serialise all but the exception, which stays in its process. seconds: that the call took."""
    score = outcome.score
    fields = {
        "score": [score.reward, dict(score.parts), score.correct, score.answer],
        "reply": outcome.reply,
        "problem": outcome.problem,
        "returned": outcome.returned,
        "detail": outcome.detail,
        "seconds": seconds,
    }
    return json.dumps(fields).encode()


def received(message: dict[str, Any]) -> Outcome:
    """The outcome of a message, whose problem may be the receiver's own."""
    score = Score(*message["score"]) if "score" in message else NO_SCORE
    returned = message.get("returned", False)
    return Outcome(score, message.get("reply"), message["problem"], returned, message["detail"])


def describe_failure(
    task: Any, method: str, prompt: Prompt, turns: Sequence[TurnText], problem: str
) -> str:
    """Format a failed call of `score` or `reply` with all its inputs."""
    rows: list[tuple[str, Any]] = [("prompt", prompt.text)]
    if prompt.messages:
        rows = [(str(m.get("role")), m.get("content")) for m in prompt.messages]
    elif prompt.tokens:
        rows = [("tokens", list(prompt.tokens))]
    rows += [("prefill", prompt.prefill)] if prompt.prefill else []
    rows += [("response" if turn.sampled else "reply", turn.text) for turn in turns]
    shown = [f"  {name + ':':9} {value!r}" for name, value in [*rows, ("answer", prompt.answer)]]
    return "\n".join([f"{TITLES[method]} {task!r} {problem}", *shown])
