"""Leaves, who trains on which, and how they become packed tensors.

A leaf is one prompt group, or a piece of one: the smallest unit that is packed, and the one whose
gradient always has the same shapes. Its global index is its prompt_id. Which rank owns it depends
on that index alone; token counts only decide how a rank's leaves share forward passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from mesh.types import Rollout


@dataclass(frozen=True)
class Leaf:
    """Rollouts of one prompt, in the order of their sample ids, each with its advantage and the
    weight of its tokens. `piece` counts the pieces of a group that was cut.
    """

    prompt_id: int
    piece: int
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        """Packed tokens: prompts and responses."""
        return sum(map(_length, self.rollouts))


@dataclass(frozen=True)
class PackedBatch:
    """S sequences, prompt then response, end to end: T tokens, of which A are response tokens.

    The hidden state at `index_A` predicts `targets_A`, the response tokens in order; all `_A`
    tensors are aligned with them. Sequence s fills tokens cu_seqlens[s] to cu_seqlens[s + 1].
    """

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64, from 0 in every sequence
    cu_seqlens: Tensor  # int32, S + 1 entries
    max_seqlen: int
    index_A: Tensor  # int64, into T
    targets_A: Tensor  # int64
    generator_logprobs_A: Tensor  # float32
    advantages_A: Tensor  # float32
    weights_A: Tensor  # float32
    sequence_A: Tensor  # int64, into S

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)


def leaves(
    rollouts: Sequence[Rollout],
    advantages_R: Tensor,
    weights_R: Tensor,
    leaf_tokens: int | None = None,
) -> list[Leaf]:
    """The leaves of R rollouts, given in any order, sorted by (prompt_id, piece).

    `advantages_R` and `weights_R` are aligned with `rollouts`. A group of more than `leaf_tokens`
    tokens is cut between rollouts (None: never) by filling pieces in the order of the sample ids: a
    rule of the group alone. Raises ValueError for an empty prompt or logprobs that do not fit the
    tokens, AssertionError for a rollout that came twice.
    """
    assert len(rollouts) == len(advantages_R) == len(weights_R), (
        "need one advantage and one weight a rollout"
    )
    for rollout in rollouts:
        _check(rollout)
    twice = [ids for ids, count in Counter(map(_ids, rollouts)).items() if count > 1]
    assert not twice, f"rollouts (prompt_id, sample_id) came twice: {twice[:8]}"
    members = zip(rollouts, advantages_R.tolist(), weights_R.tolist(), strict=True)
    ordered = sorted(members, key=lambda member: _ids(member[0]))
    groups = groupby(ordered, key=lambda member: member[0].prompt_id)
    return [leaf for _, group in groups for leaf in _pieces(list(group), leaf_tokens)]


def owner(prompt_id: int, num_ranks: int) -> int:
    """The data-parallel rank that trains on a prompt: leaf i belongs to rank i mod D."""
    return prompt_id % num_ranks


def assign(prompt_ids: Iterable[int], num_ranks: int) -> list[list[int]]:
    """The prompt ids of every rank, ascending. Independent of lengths and of the order given."""
    ordered = sorted(prompt_ids)
    return [[i for i in ordered if owner(i, num_ranks) == rank] for rank in range(num_ranks)]


def microbatches(token_counts: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of consecutive leaves that share a forward pass of at most `max_tokens` tokens.

    Greedy and never reordering. A leaf of more than `max_tokens` is a microbatch of its own, so
    max_tokens=0 packs every leaf by itself.
    """
    filled: list[list[int]] = []
    room = 0
    for index, count in enumerate(token_counts):
        if not filled or count > room:
            filled.append([])
            room = max_tokens
        filled[-1].append(index)
        room -= count
    return filled


def schedule(
    token_counts_by_rank: Sequence[Sequence[int]], max_tokens: int
) -> list[list[list[int]]]:
    """Every rank's microbatches, padded with empty ones to the same number: `[rank][microbatch]` is
    a list of indices into that rank's leaves.

    Every rank derives it from the token counts of all ranks. No leaf anywhere: no microbatch.
    """
    by_rank = [microbatches(counts, max_tokens) for counts in token_counts_by_rank]
    num_microbatches = max(map(len, by_rank), default=0)
    return [own + [[] for _ in range(num_microbatches - len(own))] for own in by_rank]


def pack(leaf_list: Sequence[Leaf]) -> PackedBatch:
    """One microbatch, on the CPU, in the order of the leaves and their rollouts.

    No leaves give a batch that still runs: one sequence of one token, and A = 0. Raises ValueError
    for an empty prompt or logprobs that do not fit the tokens.
    """
    leaf_list = leaf_list or [_NOTHING]
    rollouts = [rollout for leaf in leaf_list for rollout in leaf.rollouts]
    for rollout in rollouts:
        _check(rollout)
    lengths = [_length(r) for r in rollouts]
    bounds = [0, *accumulate(lengths)]
    tokens_T = torch.tensor([t for r in rollouts for t in (*r.prompt_tokens, *r.tokens)])
    index_A = torch.cat([_predictors(r, start) for r, start in zip(rollouts, bounds, strict=False)])
    responses_S = torch.tensor([len(r.tokens) for r in rollouts])
    sequence_A = torch.arange(len(rollouts)).repeat_interleave(responses_S)
    return PackedBatch(
        tokens_T=tokens_T,
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(lengths),
        index_A=index_A,
        targets_A=tokens_T[index_A + 1],
        generator_logprobs_A=_float32([x for r in rollouts for x in r.logprobs]),
        advantages_A=_float32([a for leaf in leaf_list for a in leaf.advantages])[sequence_A],
        weights_A=_float32([w for leaf in leaf_list for w in leaf.weights])[sequence_A],
        sequence_A=sequence_A,
    )


def assert_complete(
    seen: Iterable[tuple[int, int]], prompt_ids: Iterable[int], group_size: int
) -> None:
    """Every rollout of the step, as (prompt_id, sample_id), was trained on once: none lost, none
    twice, none foreign. Raises AssertionError naming them.
    """
    expected = {(p, g) for p in prompt_ids for g in range(group_size)}
    counts = Counter(seen)
    problems = {
        "lost": sorted(expected - counts.keys()),
        "trained on twice": sorted(ids for ids, count in counts.items() if count > 1),
        "not of this step": sorted(counts.keys() - expected),
    }
    found = [f"{what}: {ids[:8]} ({len(ids)} in all)" for what, ids in problems.items() if ids]
    assert not found, "rollouts (prompt_id, sample_id) " + "; ".join(found)


_Member = tuple[Rollout, float, float]  # a rollout, its advantage, the weight of its tokens


def _pieces(group: list[_Member], leaf_tokens: int | None) -> list[Leaf]:
    sizes = [_length(rollout) for rollout, _, _ in group]
    limit = sum(sizes) if leaf_tokens is None else leaf_tokens
    return [
        _leaf(piece, [group[i] for i in indices])
        for piece, indices in enumerate(microbatches(sizes, limit))
    ]


def _leaf(piece: int, members: list[_Member]) -> Leaf:
    rollouts, advantages, weights = zip(*members, strict=True)
    return Leaf(rollouts[0].prompt_id, piece, rollouts, advantages, weights)


def _predictors(rollout: Rollout, start: int) -> Tensor:
    """int64: positions in T whose hidden states predict the response of a sequence at `start`."""
    first = start + len(rollout.prompt_tokens) - 1
    return torch.arange(first, first + len(rollout.tokens))


def _check(rollout: Rollout) -> None:
    which = f"prompt_id={rollout.prompt_id} sample_id={rollout.sample_id}"
    if not rollout.prompt_tokens:
        raise ValueError(f"{which}: the prompt is empty; give it at least one token")
    if len(rollout.logprobs) != len(rollout.tokens):
        counts = f"{len(rollout.logprobs)} logprobs for {len(rollout.tokens)} tokens"
        raise ValueError(f"{which}: {counts}; give one for each")


def _ids(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt_id, rollout.sample_id


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_tokens) + len(rollout.tokens)


def _float32(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


_NOTHING = Leaf(-1, 0, (Rollout(-1, -1, (0,), (), (), 0.0, "stop"),), (0.0,), (0.0,))
