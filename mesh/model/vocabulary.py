"""The vocabulary of the head: tiles that are the same on every mesh, and ids without a text.

A padded vocabulary has rows for which the tokenizer has no token. Both roles give them probability
exactly 0: their logits are set to one number before anything reads them, so low that its exp() is 0
beside any other. It is finite, so that a tile of such ids alone has no NaN.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch

from mesh.invariant.switch import current
from mesh.layout.sizes import MAX_TP
from mesh.types import IdSpans

MAX_TILE = 32768

MASKED = -1e20
"""Logit of an id without a text; at any temperature from 1e-18 to 1e16 its exp() is exactly 0."""


def mask_ids(logits_AV: torch.Tensor, textless: IdSpans, first: int) -> None:
    """Set the logits of the `textless` ids to `MASKED`, in place; `first`: id of the first column.

    Spans are slices, known before any tensor: a captured graph replays the same writes.
    """
    for start, stop in spans_within(textless, first, first + logits_AV.shape[-1]):
        logits_AV[:, start:stop].fill_(MASKED)


@cache
def spans_within(spans: IdSpans, first: int, last: int) -> IdSpans:
    """The parts of `spans` in first..last-1, counted from `first`."""
    inside = [(max(start, first) - first, min(stop, last) - first) for start, stop in spans]
    return tuple((start, stop) for start, stop in inside if start < stop)


@cache
def vocab_tiles(vocab_size: int, num_shards: int = 1) -> tuple[tuple[int, int], ...]:
    """Half-open tiles (first, last) of one of `num_shards` equal shards, in local indices.

    The tiles of the whole vocabulary are the same for every `num_shards` up to MAX_TP: it is halved
    as often as MAX_TP allows, and each part split into pieces of at most MAX_TILE.
    Raises ValueError if `num_shards` would split a tile.
    """
    parts = MAX_TP
    while vocab_size % parts:
        parts //= 2
    if parts % num_shards:
        raise ValueError(f"a vocabulary of {vocab_size} cannot be split into {num_shards} shards")
    width = vocab_size // parts
    per_part = -(-width // MAX_TILE)
    edges = [
        part * width + piece * width // per_part
        for part in range(parts)
        for piece in range(per_part)
    ]
    edges = [*edges[: len(edges) // num_shards], vocab_size // num_shards]
    return tuple(pairwise(edges))


def vocab_products(rows: int, num_shards: int) -> list[list[int]]:
    """Tile edges of each matrix product over a vocabulary shard of this many rows."""
    tiles = vocab_tiles(rows * num_shards, num_shards)
    if is_one_product(rows * num_shards):
        return [[0, *(last for _, last in tiles)]]
    return [list(tile) for tile in tiles]


def is_one_product(vocab_size: int) -> bool:
    """True if a shard's tiles are one matrix product: for small vocabularies, which need little
    memory. With the switch on, only on CPU, where the self-test treats it as a layer whose outputs
    are sharded.
    """
    switch = current()
    return vocab_size <= MAX_TILE and (switch is None or switch.device_type == "cpu")
