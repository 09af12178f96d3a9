"""Comparisons of bits, counted: the nouns of every check that two results are the same.

A value that is not finite is a failure of its own, also where both sides have it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mesh.lifecycle.process import Process
from mesh.types import Rollout, RolloutKey

Rollouts = Mapping[RolloutKey, Rollout]


@dataclass(frozen=True)
class Mismatch:
    """The first difference of two results, on the rank that saw it.

    values: ours, and what was expected. Where a token differs: `index` counts in the response,
    `position` in the sequence, the prompt's first token being 0, and `logprobs` are ours and theirs
    (None: that side lacks the token). module: the first one whose output differs, where it was
    traced, and module_position the first position at which it does (it may be an earlier one).
    """

    what: str
    values: tuple[str, str]
    step: int | None = None
    prompt_id: int | None = None
    sample_id: int | None = None
    index: int | None = None
    position: int | None = None
    token: int | None = None
    logprobs: tuple[float | None, float | None] | None = None
    rank: int | None = None
    module: str | None = None
    module_position: int | None = None

    @property
    def key(self) -> RolloutKey | None:
        """The sequence; None where it is something else that differs."""
        if self.prompt_id is None or self.sample_id is None:
            return None
        return self.prompt_id, self.sample_id

    def __str__(self) -> str:
        where = [
            f"{name.replace('_id', '')} {value}"
            for name in ("step", "prompt_id", "sample_id", "position", "rank")
            if (value := getattr(self, name)) is not None
        ]
        found = f"{self.what} {self.values[0]} instead of {self.values[1]}"
        at = f" at position {self.module_position}" if self.module_position is not None else ""
        module = [f"first divergent module {self.module}{at}"] if self.module else []
        return ", ".join([*module, *where, found])


@dataclass(frozen=True)
class Tally:
    """A count of comparisons, of those that failed (a bit differs, or a value is not finite on
    either side), of values that are not finite, and the first failure.
    """

    compared: int = 0
    different: int = 0
    not_finite: int = 0
    first: Mismatch | None = None

    @property
    def passed(self) -> bool:
        """False if nothing was compared."""
        return self.compared > 0 and self.different == 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.compared + other.compared,
            self.different + other.different,
            self.not_finite + other.not_finite,
            self.first or other.first,
        )


def add(tallies: Sequence[Tally]) -> Tally:
    """The sum of tallies; its first mismatch is that of the first which has one."""
    return sum(tallies, Tally())


def of_all_ranks(process: Process, tally: Tally) -> Tally:
    """The tallies of all ranks together, on every rank. Collective."""
    first = tally.first and replace(tally.first, rank=process.rank)
    return add(process.gather(replace(tally, first=first)))


def by_key(rollouts: Sequence[Rollout]) -> dict[RolloutKey, Rollout]:
    return {r.key: r for r in rollouts}


def compare_rollouts(got: Rollouts, expected: Rollouts, step: int | None = None) -> Tally:
    """Tokens and logprobs of every sequence in `got`; one comparison a loss token.

    Raises KeyError for a sequence that `expected` does not have.
    """
    return add([_compare(got[key], expected[key], step) for key in sorted(got)])


def _compare(got: Rollout, expected: Rollout, step: int | None) -> Tally:
    longest = max(got.length, expected.length)
    mine, theirs = (_bits(rollout, longest) for rollout in (got, expected))
    wrong = (mine != theirs).any(0)
    finite = [np.isfinite(np.array(side.logprobs, np.float32)) for side in (got, expected)]
    for mask in finite:
        wrong[: len(mask)] |= ~mask
    first = _mismatch(got, expected, int(wrong.argmax()), step) if wrong.any() else None
    return Tally(longest, int(wrong.sum()), sum(int((~mask).sum()) for mask in finite), first)


def _mismatch(got: Rollout, expected: Rollout, number: int, step: int | None) -> Mismatch:
    """The mismatch of the `number`-th loss token of a sequence."""
    longer = got if got.length > number else expected
    index = longer.loss_indices[number]
    ours, theirs = (
        side.logprobs[number] if number < side.length else None for side in (got, expected)
    )
    return Mismatch(
        "token",
        (_shown(got, number), _shown(expected, number)),
        step,
        *longer.key,
        index,
        len(longer.prompt_tokens) + index,
        longer.tokens[index],
        (ours, theirs),
    )


def _bits(rollout: Rollout, length: int) -> np.ndarray:
    """Loss tokens, the bits of their logprobs, and whether there is one: int64 [3, length]."""
    bits = np.zeros((3, length), np.int64)
    count = rollout.length
    bits[0, :count] = [rollout.tokens[i] for i in rollout.loss_indices]
    bits[1, :count] = np.array(rollout.logprobs, np.float32).view(np.int32)
    bits[2, :count] = 1
    return bits


def _shown(rollout: Rollout, number: int) -> str:
    if number >= rollout.length:
        return "the end"
    token = rollout.tokens[rollout.loss_indices[number]]
    return f"{token} with logprob {shown_float(rollout.logprobs[number])}"


def shown_float(value: float) -> str:
    """A float as people read it, and exactly."""
    return f"{value!r} ({value.hex()})"


def compare_values(
    got: Mapping[str, float | str], expected: Mapping[str, float | str], step: int | None = None
) -> Tally:
    """Numbers and texts by name; both sides have the same names."""
    assert got.keys() == expected.keys(), f"{sorted(got)} instead of {sorted(expected)}"
    return add([_compare_value(name, got[name], expected[name], step) for name in got])


def _compare_value(name: str, got: float | str, expected: float | str, step: int | None) -> Tally:
    if isinstance(got, str) or isinstance(expected, str):
        wrong, infinite, values = got != expected, 0, (str(got), str(expected))
    else:
        wrong = struct.pack("d", got) != struct.pack("d", expected)
        infinite = int((~np.isfinite([got, expected])).sum())
        values = (shown_float(got), shown_float(expected))
    first = Mismatch(name, values, step) if wrong or infinite else None
    return Tally(1, int(first is not None), infinite, first)
