"""The exchange: rollouts from the generator's ranks to the trainer's.

Point-to-point on a gloo group of its own, so that no other message can come between. A generator
replica sends every trainer rank the outlines of all its rollouts, which the step's statistics and
the cut need, and the tokens to the owner of a prompt alone. Sends are asynchronous: a generator
starts the next wave while the trainer works on this one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from mesh.layout.meshes import Layout
from mesh.rl.cutting import owner
from mesh.types import FINISH_REASONS, Outline, Rollout, Turn, Wave, outline

COLUMNS = 12
"""Of the table that a replica sends: an outline, then the lengths of what its tokens come in, and
of the text of its parts."""

VERDICTS = (None, False, True)
"""Values of `correct`, by their number in the table."""


def replica_of(prompt_id: int, num_replicas: int) -> int:
    """The generator replica that answers a prompt."""
    return prompt_id % num_replicas


class Exchange:
    """Owns the process group and the pending sends. Made by all ranks of the world."""

    def __init__(self, layout: Layout, group_size: int, timeout: timedelta) -> None:
        self.layout = layout
        self.group_size = group_size
        self.rank = dist.get_rank()
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.pending: list[tuple[dist.Work | None, torch.Tensor]] = []
        generator, tp = layout.generator_ranks, layout.generator.tp
        self.sources = generator[::tp]
        dist.barrier(self.group)

    def __call__(self, prompt_ids: Sequence[int], rollouts: Sequence[Rollout]) -> Wave:
        """Bring a wave's rollouts to the trainer. Every rank of the world calls it.

        prompt_ids: all prompts of the wave; rollouts: this replica's, on its ranks.
        """
        received: list[tuple[list[Outline], list[Rollout]]] = []
        if self.rank in self.sources:
            self._send(rollouts)
        if self.rank in self.layout.trainer_ranks:
            for replica, source in enumerate(self.sources):
                mine = [i for i in prompt_ids if replica_of(i, len(self.sources)) == replica]
                if source == self.rank:
                    received.append(([outline(r) for r in rollouts], self._owned(rollouts)))
                else:
                    received.append(self._receive(source, len(mine)))
        return _merge(received, len(prompt_ids) * self.group_size)

    def flush(self) -> None:
        """Wait until all sends have arrived. Called once a step, by every rank."""
        for work, _ in self.pending:
            if work is not None:
                work.wait()
        self.pending.clear()

    def _trainer_dp(self, rank: int) -> int:
        return self.layout.trainer_ranks.index(rank) // self.layout.trainer.tp

    def _owned(self, rollouts: Sequence[Rollout], rank: int | None = None) -> list[Rollout]:
        dp = self._trainer_dp(self.rank if rank is None else rank)
        return [r for r in rollouts if owner(r.prompt_id, self.layout.trainer.dp) == dp]

    def _send(self, rollouts: Sequence[Rollout]) -> None:
        table, parts = _table(rollouts), _parts(rollouts)
        for target in self.layout.trainer_ranks:
            if target != self.rank:
                self._isend(table, target)
                self._isend(parts, target)
                owned = self._owned(rollouts, target)
                tokens, logprobs = _payload(owned)
                self._isend(tokens, target)
                self._isend(logprobs, target)

    def _isend(self, tensor: torch.Tensor, target: int) -> None:
        if tensor.numel():
            self.pending.append((dist.isend(tensor, target, group=self.group), tensor))

    def _receive(self, source: int, num_prompts: int) -> tuple[list[Outline], list[Rollout]]:
        table = torch.empty(num_prompts * self.group_size, COLUMNS, dtype=torch.float64)
        self._recv(table, source)
        parts = torch.empty(int(table[:, -1].sum()), dtype=torch.uint8)
        self._recv(parts, source)
        outlines, dp = _outlines(table, parts), self._trainer_dp(self.rank)
        owned = [
            (one, row)
            for one, row in zip(outlines, table.tolist(), strict=True)
            if owner(one.prompt_id, self.layout.trainer.dp) == dp
        ]
        tokens = torch.empty(sum(_payload_length(row) for _, row in owned), dtype=torch.int64)
        logprobs = torch.empty(sum(one.length for one, _ in owned), dtype=torch.float32)
        self._recv(tokens, source)
        self._recv(logprobs, source)
        return outlines, _unpack(owned, tokens, logprobs)

    def _recv(self, tensor: torch.Tensor, source: int) -> None:
        if tensor.numel():
            dist.recv(tensor, source, group=self.group)


def _table(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """One row per rollout, float64 [rollouts, COLUMNS]."""
    rows = [
        (r.prompt_id, r.sample_id, r.length, r.num_tokens, r.reward,
         FINISH_REASONS.index(r.finish_reason), VERDICTS.index(r.correct),
         len(r.prompt_tokens), len(r.turns), one.turns, one.replied, len(_parts_text(r)))
        for r, one in ((r, outline(r)) for r in rollouts)
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64).view(-1, COLUMNS)


def _parts_text(rollout: Rollout) -> bytes:
    return json.dumps(rollout.parts).encode() if rollout.parts else b""


def _parts(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """The parts of all rollouts as texts, one after the other: names differ by prompt and task."""
    return torch.tensor(list(b"".join(map(_parts_text, rollouts))), dtype=torch.uint8)


def _outlines(table: torch.Tensor, parts: torch.Tensor) -> list[Outline]:
    found, texts, start = [], bytes(parts.tolist()), 0
    for row in table.tolist():
        prompt, sample, length, num_tokens = map(int, row[:4])
        text = texts[start : start + int(row[-1])]
        start += len(text)
        pairs = tuple((name, value) for name, value in json.loads(text)) if text else ()
        reason, correct = FINISH_REASONS[int(row[5])], VERDICTS[int(row[6])]
        said, replied = int(row[9]), int(row[10])
        sizes = prompt, sample, length, num_tokens
        found.append(Outline(*sizes, row[4], reason, pairs, correct, said, replied))
    return found


def _payload_length(row: Sequence[float]) -> int:
    """Integers that a rollout takes: its tokens, and two for each turn."""
    return int(row[3]) + 2 * int(row[8])


def _payload(rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
    numbers: list[int] = []
    for r in rollouts:
        numbers += [*r.prompt_tokens, *r.tokens]
        numbers += [n for turn in r.turns for n in (turn.num_tokens, int(turn.sampled))]
    logprobs = [x for r in rollouts for x in r.logprobs]
    return torch.tensor(numbers, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float32)


def _unpack(
    owned: Sequence[tuple[Outline, Sequence[float]]], numbers: torch.Tensor, logprobs: torch.Tensor
) -> list[Rollout]:
    """owned: outlines with their rows of the table."""
    number_list, logprob_list = numbers.tolist(), logprobs.tolist()
    rollouts, n, a = [], 0, 0
    for one, row in owned:
        middle, end = n + int(row[7]), n + one.num_tokens
        turns = number_list[end : n + _payload_length(row)]
        rollouts.append(
            Rollout(
                *one.key,
                tuple(number_list[n:middle]),
                tuple(number_list[middle:end]),
                tuple(logprob_list[a : a + one.length]),
                one.reward,
                one.finish_reason,
                tuple(Turn(*pair) for pair in zip(turns[::2], map(bool, turns[1::2]), strict=True)),
                one.parts,
                one.correct,
            )
        )
        n, a = n + _payload_length(row), a + one.length
    return rollouts


def _merge(received: Sequence[tuple[list[Outline], list[Rollout]]], expected: int) -> Wave:
    if not received:
        return Wave([], [])
    outlines = [one for outlines, _ in received for one in outlines]
    outlines.sort(key=lambda o: o.key)
    assert len(outlines) == expected, f"{len(outlines)} rollouts arrived, {expected} were due"
    return Wave(outlines, sorted((r for _, mine in received for r in mine), key=lambda r: r.key))
