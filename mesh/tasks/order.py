"""Which row of a data set a draw takes: a function of counters, without a cursor.

The draws of a run have positions 0, 1, 2, ... in one endless sequence, in which each epoch is a
permutation of the rows of its own. A permutation is a cipher: a Feistel network over the smallest
even number of bits that holds the rows, walked on until it falls among them (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002). So one row of any epoch costs microseconds, and
nothing is kept, saved or skipped through when a run is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

FEISTEL_ROUNDS = 8
BLOCK = 1000
"""Draws in which a mixture has its weights exactly, to one in so many."""

_MASK = (1 << 64) - 1


def key_of(*parts: int | str) -> int:
    """64 bits of counters and names."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permuted(index: int, size: int, key: int) -> int:
    """The image of `index` under a permutation of range(size) that belongs to `key`."""
    assert 0 <= index < size, f"index {index} of {size}"
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mixed(key + (round << 58) + right) & low)
        index = left << half | right
        if index < size:
            return index


def _mixed(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), of x steps of its counter."""
    x = (x * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Epochs:
    """The endless sequence of one data set of `size` rows, shuffled by (seed, epoch). name: keeps
    two sets of one mixture apart."""

    size: int
    seed: int
    shuffle: bool = True
    name: str = ""

    def row(self, position: int) -> int:
        """The row at a position: each row once in `size` positions."""
        epoch, index = divmod(position, self.size)
        if not self.shuffle:
            return index
        return permuted(index, self.size, key_of("epoch", self.name, self.seed, epoch))

    def refill(self, step: int, round: int, index: int) -> int:
        """A row for a later round of a step, from a permutation of that round."""
        key = key_of("refill", self.name, self.seed, step, round, index // self.size)
        return permuted(index % self.size, self.size, key)


@dataclass(frozen=True)
class Mixture:
    """The set that a draw takes, and the position in that set's own sequence.

    Each block of draws holds every set as often as its share says, in an order of the block's own.
    So a set's position is a function of the draw's, and each of its positions is drawn once.
    """

    counts: tuple[int, ...]
    seed: int

    def draw(self, position: int) -> tuple[int, int]:
        """(set, position in it) of a draw."""
        if len(self.counts) == 1:
            return 0, position
        block, slot = divmod(position, sum(self.counts))
        return self._at(block, permuted(slot, sum(self.counts), key_of("mix", self.seed, block)))

    def refill(self, step: int, round: int, index: int) -> tuple[int, int]:
        """(set, index in it) for a later round of a step."""
        if len(self.counts) == 1:
            return 0, index
        block, slot = divmod(index, sum(self.counts))
        key = key_of("mix refill", self.seed, step, round, block)
        return self._at(block, permuted(slot, sum(self.counts), key))

    def _at(self, block: int, slot: int) -> tuple[int, int]:
        for which, count in enumerate(self.counts):
            if slot < count:
                return which, block * count + slot
            slot -= count
        raise AssertionError("a slot beyond the block")


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Number of draws of each set in `BLOCK`; the remainders go to the largest fractions. Raises
    ValueError where one of them would have none.
    """
    total = sum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: BLOCK - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise ValueError(f"a share below one in {BLOCK} draws is none")
    return tuple(counts)
