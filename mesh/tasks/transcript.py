"""Rollouts as a task and a reader see them: the texts of their turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mesh.tasks.response import Response
from mesh.text.tokenizer import Tokenizer
from mesh.types import Completion, FinishReason, Rollout, TurnText


def said(tokenizer: Tokenizer, turn: Completion | Rollout) -> TurnText:
    """A turn that the policy sampled."""
    text, plain = tokenizer.texts(turn)
    return TurnText(text, True, plain, turn.tokens, turn.finish_reason)


def replied(tokenizer: Tokenizer, tokens: Sequence[int]) -> TurnText:
    """A turn that the environment wrote, by its tokens."""
    turn = Completion(0, 0, tuple(tokens), (), "length")  # nothing of it is a stop token
    text, plain = tokenizer.texts(turn)
    return TurnText(text, False, plain, turn.tokens)


def response_of(turns: Sequence[TurnText], reason: FinishReason) -> Response:
    """A rollout as its task scores it; the last turn was sampled."""
    last = turns[-1]
    return Response(last.text, last.plain, last.tokens, reason, turns)


def shown(tokenizer: Tokenizer, rollout: Rollout) -> dict[str, Any]:
    """Fields of `samples.jsonl` on a rollout's text: `response`, as it was scored, and all turns of
    a conversation.
    """
    if not rollout.turns:
        return {"response": tokenizer.response(rollout)}
    turns = list(turn_texts(tokenizer, rollout))
    listed = [{"text": turn.text, "sampled": turn.sampled} for turn in turns]
    return {"response": turns[-1].text, "turns": listed}


def turn_texts(tokenizer: Tokenizer, rollout: Rollout) -> Iterator[TurnText]:
    """The turns of a conversation; the reasons for which each has ended are not known any more."""
    place = 0
    for turn in rollout.turns:
        tokens = rollout.tokens[place : place + turn.num_tokens]
        place += turn.num_tokens
        if turn.sampled:
            yield said(tokenizer, Completion(*rollout.key, tokens, (), "stop"))
        else:
            yield replied(tokenizer, tokens)
