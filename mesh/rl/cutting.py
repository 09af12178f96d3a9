"""The cut of a step: which update and which rank train on which prompt, and which leaves share a
forward pass.

Every rank derives the cut of all ranks from the outlines of all rollouts, so the number of passes
is the same everywhere. Minibatches are part of what is computed, and do not depend on the mesh;
nothing else of the program depends on how the rest is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from mesh.tasks.order import key_of
from mesh.types import Outline


def owner(prompt_id: int, num_ranks: int) -> int:
    """The data-parallel rank that trains on a prompt: prompt i belongs to rank i mod D."""
    return prompt_id % num_ranks


def assign(prompt_ids: Iterable[int], num_ranks: int) -> list[list[int]]:
    """The prompt ids of every rank, ascending. Independent of lengths and of the order given."""
    ordered = sorted(prompt_ids)
    return [[i for i in ordered if owner(i, num_ranks) == rank] for rank in range(num_ranks)]


def minibatches(
    prompt_ids: Iterable[int], num_updates: int, seed: int, step: int
) -> list[set[int]]:
    """The prompts of each update of a step: as many for each, or one fewer where P prompts do not
    divide.

    The prompts are dealt out. Of them in order, those that lie P / num_updates apart come one after
    another, by hashes of (seed, step, prompt_id). So the cut is random, the same on any mesh, and
    gives every data-parallel rank as much of a minibatch wherever its size divides by their number.
    """
    ordered = sorted(prompt_ids)
    size = -(-len(ordered) // num_updates)
    rounds = [ordered[place::size] for place in range(size)]
    dealt = [
        i for ids in rounds for i in sorted(ids, key=lambda i: key_of("minibatch", seed, step, i))
    ]
    return [set(dealt[number::num_updates]) for number in range(num_updates)]


def fill(token_counts: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of consecutive items that share a bin of at most `max_tokens` tokens.

    Greedy and never reordering. An item of more than `max_tokens` has a bin of its own, so
    max_tokens=0 keeps every item by itself.
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
    """Every rank's forward passes, padded with empty ones to the same number: `[rank][pass]` is a
    list of indices into that rank's leaves. No leaf anywhere: no pass.
    """
    by_rank = [fill(counts, max_tokens) for counts in token_counts_by_rank]
    num_passes = max(map(len, by_rank), default=0)
    return [own + [[] for _ in range(num_passes - len(own))] for own in by_rank]


def leaf_tokens(outlines: Sequence[Outline], num_ranks: int, max_tokens: int) -> list[list[int]]:
    """Tokens of every leaf of every rank, as `packing.leaves` cuts them.

    outlines: sorted by key. A group of more than `max_tokens` tokens is cut into pieces.
    """
    counts: list[list[int]] = [[] for _ in range(num_ranks)]
    for prompt_id, group in groupby(outlines, key=lambda o: o.prompt_id):
        sizes = [o.num_tokens for o in group]
        pieces = fill(sizes, max_tokens)
        counts[owner(prompt_id, num_ranks)] += [sum(sizes[i] for i in piece) for piece in pieces]
    return counts
