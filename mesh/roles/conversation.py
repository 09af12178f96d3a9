"""The environment's side of conversations: which turns get a reply, and what ends them.

One rank of a replica, the one that speaks, asks the task for replies and tells its other tp ranks
which have arrived: they come at the pace of a clock, and all ranks of an engine have to make the
same calls. When a reply arrives decides which sequences share a batch, and nothing else: where
kernels are batch-invariant, no bit of a rollout depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from mesh.engine.base import Continuation
from mesh.engine.conversation import Dialogue
from mesh.tasks.prompts import SHOWN
from mesh.tasks.replying import converses
from mesh.tasks.scorer import Scorer
from mesh.tasks.transcript import replied, said
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import Unencodable
from mesh.types import Completion, FinishReason, Prompt, Reply, RolloutKey, Sampling, TurnText

WAIT_SECONDS = 0.5  # between two heartbeats, where all conversations wait for a reply

Arrived = tuple[RolloutKey, tuple[int, ...] | None]
"""A reply's tokens; None: the conversation is over."""


@dataclass(frozen=True)
class Limits:
    """Limits of a conversation that its task would continue. max_tokens: sampled and replied; 0: as
    many as the context of `max_length` holds.
    """

    max_turns: int
    max_tokens: int
    max_length: int

    def room(self, dialogue: Dialogue) -> tuple[int, FinishReason]:
        """Tokens that it may still have, and the limit that allows no more."""
        context = self.max_length - dialogue.length
        tokens = self.max_tokens - len(dialogue.tokens) if self.max_tokens else context
        return (tokens, "tokens") if tokens < context else (context, "context")


class Conversations:
    """Owns the conversations of one replica's prompts, until all of them have ended.

    speaks: this rank asks for replies; group: the replica's tp ranks, on the CPU; None: one.
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: Mapping[int, Prompt],
        encoder: PromptEncoder,
        limits: Limits,
        sampling: Sampling,
        speaks: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.scorer, self.prompts, self.encoder, self.limits = scorer, prompts, encoder, limits
        self.sampling, self.speaks, self.group = sampling, speaks, group
        self.texts: dict[RolloutKey, list[TurnText]] = {}  # where this rank speaks
        self.failed: set[RolloutKey] = set()  # whose reply has failed, where this rank speaks
        self.waiting: dict[RolloutKey, Dialogue] = {}
        self.limit: dict[RolloutKey, FinishReason] = {}  # what bounds the turn that runs
        self.ended: dict[RolloutKey, FinishReason] = {}

    def hear(self, dialogue: Dialogue, turn: Completion) -> None:
        """Ask for the reply to a turn that has stopped; a turn that was cut is the last one."""
        key = turn.key
        if self.speaks:
            self.texts.setdefault(key, []).append(said(self.encoder.tokenizer, turn))
        if turn.finish_reason != "stop":
            self.ended[key] = self.limit.get(key, "length")
            return
        self.waiting[key] = dialogue
        if self.speaks:
            seed = reply_seed(self.sampling, key, sum(turn.sampled for turn in dialogue.turns))
            texts = self.texts[key]
            self.scorer.replies.submit(key, self.prompts[key[0]], texts, seed)

    def answers(self, wait: bool) -> tuple[list[Continuation], Mapping[RolloutKey, FinishReason]]:
        """The conversations that go on, and those that have ended since the last call."""
        found = self._arrived(WAIT_SECONDS if wait else 0.0) if self.waiting else []
        continuations = [
            continuation
            for key, tokens in found
            if (continuation := self._continued(self.waiting.pop(key), key, tokens)) is not None
        ]
        ended, self.ended = self.ended, {}
        return continuations, ended

    def _arrived(self, seconds: float) -> list[Arrived]:
        """The replies that have arrived, as all tp ranks of the replica agree on them."""
        found: list[list[Arrived]] = [[]]
        if self.speaks:
            for key, reply, failed in self.scorer.replies.poll(seconds):
                self.failed |= {key} if failed else set()
                found[0].append((key, self._encoded(key, reply)))
        if self.group is not None:
            dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    def _encoded(self, key: RolloutKey, reply: Reply) -> tuple[int, ...] | None:
        if reply is None:
            return None
        prompt, texts = self.prompts[key[0]], self.texts[key]
        replies = self.scorer.replies
        try:
            tokens = self.encoder.after(prompt, texts, reply)
            if not (replies.warned or replies.warning):
                replies.warning = control_warning(self.encoder, reply)
            return tokens
        except Unencodable as error:
            replies.refuse(prompt, texts, f"returned {reply!r}: {error}")
            self.failed.add(key)
            return None

    def _continued(
        self, dialogue: Dialogue, key: RolloutKey, tokens: tuple[int, ...] | None
    ) -> Continuation | None:
        """The next turn, if the reply and at least one token of the turn fit; else the end."""
        if tokens is None:
            self.ended[key] = "stop"
            return None
        room, limit = self.limits.room(dialogue)
        if sum(turn.sampled for turn in dialogue.turns) >= self.limits.max_turns:
            self.ended[key] = "turns"
        elif room <= len(tokens):
            self.ended[key] = limit
        if key in self.ended:
            return None
        if self.speaks:
            self.texts[key].append(replied(self.encoder.tokenizer, tokens))
        most = min(self.sampling.max_new_tokens, room - len(tokens))
        self.limit[key] = limit if most < self.sampling.max_new_tokens else "length"
        return Continuation(*key, tokens, most)


def control_warning(encoder: PromptEncoder, reply: Reply) -> str:
    """The warning that a text of a reply has a control token, which the model does not read as the
    characters that the task wrote; "": none has. What a chat template writes is no text of a reply.
    """
    if isinstance(reply, str):
        texts = [reply]
    else:
        messages = [reply] if isinstance(reply, Mapping) else reply or ()
        texts = [one["content"] for one in messages]
    for text in texts:
        if control := encoder.control_in(text):
            end = encoder.tokenizer.backend.token_to_id(control) in encoder.tokenizer.eos_ids
            return (
                f"warning: the reply {text[:SHOWN]!r} has the control token {control!r}"
                f"{', which ends a turn' if end else ''}: the model does not read it as text; take "
                "it out of what reply returns, unless it is there on purpose"
            )
    return ""


def warn_of_replies(scorer: Scorer, cpu_group: dist.ProcessGroup) -> None:
    """Print what some rank has to say about replies, once in a run, by the first rank. Collective;
    nothing where the task does not reply.
    """
    if not converses(scorer.task) or scorer.replies.warned:
        return
    found = [""] * dist.get_world_size(cpu_group)
    dist.all_gather_object(found, scorer.replies.warning, group=cpu_group)
    if warning := next(filter(None, found), ""):
        scorer.replies.warned = True
        if dist.get_rank() == 0:
            print(warning, flush=True)


def reply_seed(sampling: Sampling, key: RolloutKey, turn: int) -> int:
    """The seed of the reply to a rollout's turn (1, 2, ...), below 2^63: the same in every layout
    and at every repetition.
    """
    parts = ("reply", sampling.seed, sampling.step, *key, turn)
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
