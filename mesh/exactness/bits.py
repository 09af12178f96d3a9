"""Comparisons of bits, counted. A value that is not finite is a failure of its own, also where both
sides have it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mesh.lifecycle.process import Process
from mesh.types import Rollout

Key = tuple[int, int]
"""(prompt_id, sample_id)"""

Rollouts = Mapping[Key, Rollout]


@dataclass(frozen=True)
class Place:
    """Where two results first differ, on the rank that saw it.

    position: of the token in its sequence, the prompt's first one being 0; values: what this one
    has and what was expected; module: the first whose output differs, where it was sought, and
    module_position the first position at which it does (it may be an earlier one).
    """

    what: str
    values: tuple[str, str]
    step: int | None = None
    prompt_id: int | None = None
    sample_id: int | None = None
    position: int | None = None
    rank: int | None = None
    module: str | None = None
    module_position: int | None = None

    @property
    def key(self) -> Key | None:
        """The sequence, None where it is something else that differs."""
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
        module = [f"first differing module {self.module}{at}"] if self.module else []
        return ", ".join([*module, *where, found])


@dataclass(frozen=True)
class Tally:
    """What was compared: how many values, how many differ, how many are not finite, and where the
    first of those stands.
    """

    compared: int = 0
    different: int = 0
    not_finite: int = 0
    first: Place | None = None

    @property
    def passed(self) -> bool:
        """Nothing compared is no pass."""
        return self.compared > 0 and self.different == 0 and self.not_finite == 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.compared + other.compared,
            self.different + other.different,
            self.not_finite + other.not_finite,
            self.first or other.first,
        )


def add(tallies: Sequence[Tally]) -> Tally:
    """All of them together; the first difference is that of the first which has one."""
    return sum(tallies, Tally())


def of_all_ranks(process: Process, tally: Tally) -> Tally:
    """The tallies of all ranks together, on every rank. Collective."""
    first = tally.first and replace(tally.first, rank=process.rank)
    return add(process.gather(replace(tally, first=first)))


def compare_rollouts(got: Rollouts, expected: Rollouts, step: int | None = None) -> Tally:
    """Tokens and logprobs of every sequence in `got`; one comparison a response token.

    Raises KeyError for a sequence that `expected` does not have.
    """
    return add([_compare(got[key], expected[key], step) for key in sorted(got)])


def _compare(got: Rollout, expected: Rollout, step: int | None) -> Tally:
    longest = max(len(got.tokens), len(expected.tokens))
    mine, theirs = (_bits(rollout, longest) for rollout in (got, expected))
    equal = (mine == theirs).all(0)
    finite = np.isfinite(np.array([*got.logprobs, *expected.logprobs], np.float32))
    wrong = ~equal
    for rollout in (got, expected):
        wrong[: len(rollout.tokens)] |= ~np.isfinite(np.array(rollout.logprobs, np.float32))
    place = None
    if wrong.any():
        at = int(wrong.argmax())
        place = Place(
            what="token",
            values=(_shown(got, at), _shown(expected, at)),
            step=step,
            prompt_id=got.prompt_id,
            sample_id=got.sample_id,
            position=len(got.prompt_tokens) + at,
        )
    return Tally(longest, int((~equal).sum()), int((~finite).sum()), place)


def _bits(rollout: Rollout, length: int) -> np.ndarray:
    """Tokens, the bits of their logprobs, and where there is one at all: int64 [3, length]."""
    bits = np.zeros((3, length), np.int64)
    count = len(rollout.tokens)
    bits[0, :count] = rollout.tokens
    bits[1, :count] = np.array(rollout.logprobs, np.float32).view(np.int32)
    bits[2, :count] = 1
    return bits


def _shown(rollout: Rollout, index: int) -> str:
    if index >= len(rollout.tokens):
        return "the end"
    return f"{rollout.tokens[index]} with logprob {shown_float(rollout.logprobs[index])}"


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
    place = Place(what=name, values=values, step=step) if wrong or infinite else None
    return Tally(1, int(wrong), infinite, place)
