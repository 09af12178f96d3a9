"""Conversations as a loop over an engine's verbs, and those whose replies are known beforehand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mesh.engine.base import Continuation, Engine
from mesh.lifecycle.heartbeat import heartbeat
from mesh.types import (
    Completion,
    FinishReason,
    Request,
    Rollout,
    RolloutKey,
    Sampling,
    Turn,
)


@dataclass
class Dialogue:
    """One sample's conversation so far: tokens after the prompt, and the turns that cut them."""

    prompt_id: int
    sample_id: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def say(self, turn: Completion) -> None:
        """Append a sampled turn."""
        self.tokens += turn.tokens
        self.logprobs += turn.logprobs
        self.turns.append(Turn(len(turn.tokens), True))

    def reply(self, tokens: Sequence[int]) -> None:
        """Append what was replied."""
        self.tokens += tokens
        self.turns.append(Turn(len(tokens), False))

    def rollout(self, reason: FinishReason) -> Rollout:
        """The conversation as a rollout without a reward."""
        ids, turns = (self.prompt_id, self.sample_id), tuple(self.turns)
        tokens, logprobs = tuple(self.tokens), tuple(self.logprobs)
        return Rollout(*ids, self.prompt, tokens, logprobs, 0.0, reason, turns)


class Partner(Protocol):
    """The other side of conversations. It answers each turn that it hears once, at any time: by a
    continuation, or by the reason for which the conversation has ended.
    """

    def hear(self, dialogue: Dialogue, turn: Completion) -> None:
        """A turn has ended, and is in the dialogue."""

    def answers(self, wait: bool) -> tuple[list[Continuation], Mapping[RolloutKey, FinishReason]]:
        """The answers since the last call, the same on all tp ranks of an engine. wait: there is
        nothing else to do; heartbeats go on, so that the wait has to be short.
        """
        ...


def converse(
    engine: Engine, requests: Collection[Request], sampling: Sampling, partner: Partner
) -> list[Rollout]:
    """The conversations of every sample of every request, ordered by (prompt_id, sample_id), as
    rollouts without rewards. What waits for an answer does not hold up the others.
    """
    dialogues = {
        (r.prompt_id, sample): Dialogue(r.prompt_id, sample, r.tokens)
        for r in requests
        for sample in range(r.num_samples)
    }
    found: list[Rollout] = []
    engine.add([replace(request, keeps=True) for request in requests], sampling)
    while engine.unfinished or engine.kept:
        heartbeat()
        for turn in engine.step():
            dialogues[turn.key].say(turn)
            partner.hear(dialogues[turn.key], turn)
        continuations, ended = partner.answers(wait=not engine.unfinished)
        for one in continuations:
            dialogues[one.key].reply(one.reply)
        engine.extend(continuations)
        engine.drop(ended)
        found += [dialogues[key].rollout(reason) for key, reason in ended.items()]
    assert len(found) == len(dialogues), "conversations were lost"
    return sorted(found, key=lambda rollout: rollout.key)


Script = Mapping[RolloutKey, Sequence[Continuation]]
"""Every reply to a sample, in order, and how much it may then say."""


class Scripted:
    """The partner that follows a script, whatever is said. Answers at once."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.next: list[Continuation] = []
        self.ended: dict[RolloutKey, FinishReason] = {}

    def hear(self, dialogue: Dialogue, turn: Completion) -> None:
        said = sum(turn.sampled for turn in dialogue.turns)
        replies = self.script.get(turn.key, ())
        if said <= len(replies):
            self.next.append(replies[said - 1])
        else:
            self.ended[turn.key] = turn.finish_reason

    def answers(self, wait: bool) -> tuple[list[Continuation], Mapping[RolloutKey, FinishReason]]:
        found = self.next, self.ended
        self.next, self.ended = [], {}
        return found


def script_of(rollouts: Collection[Rollout]) -> Script | None:
    """The script of conversations that have been held: their replies, and turns as long as theirs.
    None: they are single answers.
    """
    if not any(r.turns for r in rollouts):
        return None
    script: dict[RolloutKey, list[Continuation]] = {}
    for r in rollouts:
        place, replies = 0, []
        for index, turn in enumerate(r.turns):
            if not turn.sampled:
                most = r.turns[index + 1].num_tokens
                replies.append(
                    Continuation(*r.key, r.tokens[place : place + turn.num_tokens], most)
                )
            place += turn.num_tokens
        script[r.key] = replies
    return script


def scripted(
    engine: Engine,
    requests: Collection[Request],
    sampling: Sampling,
    script: Script | None = None,
) -> list[Rollout]:
    """Rollouts without rewards, ordered by (prompt_id, sample_id): conversations that follow the
    script, or, without one, single answers.
    """
    if script is not None:
        return converse(engine, requests, sampling, Scripted(script))
    prompts = {request.prompt_id: request.tokens for request in requests}
    return [
        Rollout(*c.key, prompts[c.prompt_id], c.tokens, c.logprobs, 0.0, c.finish_reason)
        for c in engine.generate(requests, sampling)
    ]
