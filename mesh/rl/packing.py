"""Leaves, and how they become packed tensors.

A leaf is one prompt group, or a piece of one: the smallest unit that is packed. `cutting.py` says
which rank owns it, and which leaves share a forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from mesh.rl.cutting import fill
from mesh.types import Rollout, RolloutKey


@dataclass(frozen=True)
class Leaf:
    """Rollouts of one prompt, in the order of their sample ids, each with its advantage and the
    weight of its tokens in the sum of losses (zeros until they are known). `piece` counts the
    pieces of a group that was cut.
    """

    prompt_id: int
    piece: int
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        """Packed tokens: prompts and responses."""
        return sum(r.num_tokens for r in self.rollouts)


@dataclass(frozen=True)
class PackedBatch:
    """S sequences, prompt then response, end to end: T tokens, of which A carry loss.

    The hidden state at `index_A` predicts `targets_A`, the loss tokens in order; all `_A` tensors
    are aligned with them. Sequence s fills tokens cu_seqlens[s] to cu_seqlens[s + 1]. The ratio is
    taken against `old_logprobs_A`, the mismatch measured against `generator_logprobs_A`; both are
    the same numbers as a batch is packed.
    """

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64, from 0 in every sequence
    cu_seqlens: Tensor  # int32, S + 1 entries
    max_seqlen: int
    index_A: Tensor  # int64, into T
    targets_A: Tensor  # int64
    generator_logprobs_A: Tensor  # float32
    old_logprobs_A: Tensor  # float32
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
    twice = [ids for ids, count in Counter(r.key for r in rollouts).items() if count > 1]
    assert not twice, f"rollouts (prompt_id, sample_id) came twice: {twice[:8]}"
    members = zip(rollouts, advantages_R.tolist(), weights_R.tolist(), strict=True)
    ordered = sorted(members, key=lambda member: member[0].key)
    groups = groupby(ordered, key=lambda member: member[0].prompt_id)
    return [leaf for _, group in groups for leaf in _pieces(list(group), leaf_tokens)]


def pack(leaf_list: Sequence[Leaf]) -> PackedBatch:
    """One forward pass's batch, on the CPU, in the order of the leaves and their rollouts.

    No leaves give a batch that still runs: one sequence of one token, and A = 0. Raises ValueError
    for an empty prompt or logprobs that do not fit the tokens.
    """
    leaf_list = leaf_list or [_NOTHING]
    rollouts = [rollout for leaf in leaf_list for rollout in leaf.rollouts]
    for rollout in rollouts:
        _check(rollout)
    lengths = [r.num_tokens for r in rollouts]
    bounds = [0, *accumulate(lengths)]
    tokens_T = torch.tensor([t for r in rollouts for t in (*r.prompt_tokens, *r.tokens)])
    index_A = torch.cat([_predictors(r, start) for r, start in zip(rollouts, bounds, strict=False)])
    lengths_S = torch.tensor([r.length for r in rollouts])
    sequence_A = torch.arange(len(rollouts)).repeat_interleave(lengths_S)
    generator_logprobs_A = _float32([x for r in rollouts for x in r.logprobs])
    return PackedBatch(
        tokens_T=tokens_T,
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(lengths),
        index_A=index_A,
        targets_A=tokens_T[index_A + 1],
        generator_logprobs_A=generator_logprobs_A,
        old_logprobs_A=generator_logprobs_A,
        advantages_A=_float32([a for leaf in leaf_list for a in leaf.advantages])[sequence_A],
        weights_A=_float32([w for leaf in leaf_list for w in leaf.weights])[sequence_A],
        sequence_A=sequence_A,
    )


def assert_complete(seen: Iterable[RolloutKey], prompt_ids: Iterable[int], group_size: int) -> None:
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
    sizes = [rollout.num_tokens for rollout, _, _ in group]
    limit = sum(sizes) if leaf_tokens is None else leaf_tokens
    return [
        _leaf(piece, [group[i] for i in indices])
        for piece, indices in enumerate(fill(sizes, limit))
    ]


def _leaf(piece: int, members: list[_Member]) -> Leaf:
    rollouts, advantages, weights = zip(*members, strict=True)
    return Leaf(rollouts[0].prompt_id, piece, rollouts, advantages, weights)


def _predictors(rollout: Rollout, start: int) -> Tensor:
    """int64: positions in T that predict the loss tokens of a sequence that starts at `start`."""
    first = start + len(rollout.prompt_tokens) - 1
    if not rollout.turns:
        return torch.arange(first, first + len(rollout.tokens))
    return first + torch.tensor(rollout.loss_indices, dtype=torch.int64)


def _check(rollout: Rollout) -> None:
    which = f"prompt_id={rollout.prompt_id} sample_id={rollout.sample_id}"
    if not rollout.prompt_tokens:
        raise ValueError(f"{which}: the prompt is empty; give it at least one token")
    if len(rollout.loss_mask) != len(rollout.tokens):
        counts = f"turns of {len(rollout.loss_mask)} tokens, but {len(rollout.tokens)} tokens"
        raise ValueError(f"{which}: {counts}; let the turns cover all of them")
    if len(rollout.logprobs) != rollout.length:
        counts = f"{len(rollout.logprobs)} logprobs for {rollout.length} tokens"
        raise ValueError(f"{which}: {counts}; give one for each")


def _float32(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


_NOTHING = Leaf(-1, 0, (Rollout(-1, -1, (0,), (), (), 0.0, "stop"),), (0.0,), (0.0,))
