"""The first crossing: rollouts from the generator's ranks to the trainer's.

Point-to-point on a gloo group of its own, so that nothing else can get between. A generator
replica sends every trainer rank the outline of all its rollouts (what the step's statistics and the
schedule need), and only the owner of a prompt the tokens. Sends are asynchronous: a generator goes
on with the next wave while the trainer works on this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from mesh.layout.meshes import Layout
from mesh.rl.packing import owner
from mesh.types import FinishReason, Outline, Rollout, Wave

_FINISH: tuple[FinishReason, ...] = ("stop", "length")


def replica_of(prompt_id: int, num_replicas: int) -> int:
    """The generator replica that answers a prompt."""
    return prompt_id % num_replicas


class Exchange:
    """Owns the crossing's process group and the sends under way. Made by all ranks of the world."""

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
        received: list[tuple[torch.Tensor, list[Rollout]]] = []
        if self.rank in self.sources:
            self._send(rollouts)
        if self.rank in self.layout.trainer_ranks:
            for replica, source in enumerate(self.sources):
                mine = [i for i in prompt_ids if replica_of(i, len(self.sources)) == replica]
                if source == self.rank:
                    received.append((_table(rollouts), self._owned(rollouts)))
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
        table = _table(rollouts)
        for target in self.layout.trainer_ranks:
            if target != self.rank:
                self._isend(table, target)
                owned = self._owned(rollouts, target)
                tokens, logprobs = _payload(owned)
                self._isend(tokens, target)
                self._isend(logprobs, target)

    def _isend(self, tensor: torch.Tensor, target: int) -> None:
        if tensor.numel():
            self.pending.append((dist.isend(tensor, target, group=self.group), tensor))

    def _receive(self, source: int, num_prompts: int) -> tuple[torch.Tensor, list[Rollout]]:
        table = torch.empty(num_prompts * self.group_size, 6, dtype=torch.float64)
        if table.numel():
            dist.recv(table, source, group=self.group)
        dp = self._trainer_dp(self.rank)
        outlines = [o for o in _outlines(table) if owner(o.prompt_id, self.layout.trainer.dp) == dp]
        lengths = [(o.prompt_length, o.response_length) for o in outlines]
        tokens = torch.empty(sum(map(sum, lengths)), dtype=torch.int64)
        logprobs = torch.empty(sum(response for _, response in lengths), dtype=torch.float32)
        for tensor in (tokens, logprobs):
            if tensor.numel():
                dist.recv(tensor, source, group=self.group)
        return table, _unpack(outlines, tokens, logprobs)


def _table(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """The outlines, float64 [rollouts, 6]."""
    rows = [
        (r.prompt_id, r.sample_id, len(r.prompt_tokens), len(r.tokens), r.reward,
         _FINISH.index(r.finish_reason))
        for r in rollouts
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64).view(-1, 6)


def _outlines(table: torch.Tensor) -> list[Outline]:
    return [
        Outline(int(prompt), int(sample), int(p), int(n), reward, _FINISH[int(finish)])
        for prompt, sample, p, n, reward, finish in table.tolist()
    ]


def _payload(rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = [t for r in rollouts for t in (*r.prompt_tokens, *r.tokens)]
    logprobs = [x for r in rollouts for x in r.logprobs]
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float32)


def _unpack(
    outlines: Sequence[Outline], tokens: torch.Tensor, logprobs: torch.Tensor
) -> list[Rollout]:
    token_list, logprob_list = tokens.tolist(), logprobs.tolist()
    rollouts, t, a = [], 0, 0
    for o in outlines:
        middle, end = t + o.prompt_length, t + o.prompt_length + o.response_length
        rollouts.append(
            Rollout(
                o.prompt_id,
                o.sample_id,
                tuple(token_list[t:middle]),
                tuple(token_list[middle:end]),
                tuple(logprob_list[a : a + o.response_length]),
                o.reward,
                o.finish_reason,
            )
        )
        t, a = end, a + o.response_length
    return rollouts


def _merge(received: Sequence[tuple[torch.Tensor, list[Rollout]]], expected: int) -> Wave:
    if not received:
        return Wave([], [])
    outlines = [outline for table, _ in received for outline in _outlines(table)]
    outlines.sort(key=lambda o: (o.prompt_id, o.sample_id))
    assert len(outlines) == expected, f"{len(outlines)} rollouts arrived, {expected} were due"
    rollouts = sorted(
        (r for _, mine in received for r in mine), key=lambda r: (r.prompt_id, r.sample_id)
    )
    return Wave(outlines, rollouts)
