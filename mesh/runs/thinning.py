"""What a file of samples keeps of each step, so that it stays within its bound.

Training and each evaluation set save up: of the bytes that are left, the longer ago something of
theirs was kept, the more they may take. A training step is kept whole or not at all, with its best
group, its worst one and those by chance; of an evaluation, as many prompts as there is room for,
the same ones first. So both keep coming at even distances to the end of the run, and bytes are left
for a run that is resumed with more steps. All of it follows from the file as it is, the bound and
the number of steps: a run that was killed and resumed keeps what it would have kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

Kind = tuple[str, str]
"""Split and set of rows."""

TRAIN = "train"
TRAINING = 0.75  # of the bytes; evaluation sets share the rest
FIRST = 0.1  # of the bound: the first steps may take it at once
LARGE = 0.05  # of the bound: a training step with more than that may be kept in part
BEYOND = 0.1  # of the steps: as many more are reckoned with, that a resumed run may take


class Thinning:
    """Owns the steps of which samples were kept last."""

    def __init__(self, most: float, steps: int) -> None:
        """most: bytes of the file; steps: of the run."""
        self._most, self._end = most, steps * (1 + BEYOND)
        self._last: dict[Kind, int] = {}

    def kept(self, kind: Kind, step: int) -> None:
        """Something of this kind is in the file for this step."""
        self._last[kind] = step

    def choose(self, step: int, size: int, groups: Sequence[tuple[Kind, int]]) -> list[bool]:
        """The groups of a step that are kept. groups: kind and bytes of each, those of one kind
        after each other, first what is kept first. size: of the file before this step."""
        kinds = list(dict.fromkeys(kind for kind, _ in groups))
        sets = sum(kind[0] != TRAIN for kind in kinds)
        chosen = []
        for kind in kinds:
            part = TRAINING if kind[0] == TRAIN else (1 - TRAINING) / sets
            lengths = [length for one, length in groups if one == kind]
            number = self._number(kind, lengths, part * self._room(kind, step, size))
            chosen += [place < number for place in range(len(lengths))]
            if number:
                self.kept(kind, step)
        return chosen

    def _room(self, kind: Kind, step: int, size: int) -> float:
        """The bytes that all kinds together may take, if this one stands for all."""
        left, last = self._most - size, self._last.get(kind, 0)
        saved = left * (step - last) / max(self._end - last, 1)
        return max(saved, FIRST * self._most - size)

    def _number(self, kind: Kind, lengths: Sequence[int], share: float) -> int:
        """How many of the groups are kept."""
        totals = [total for total in accumulate(lengths) if total <= share]
        whole = len(totals) == len(lengths)
        if kind[0] == TRAIN and not whole and sum(lengths[: len(totals)]) < LARGE * self._most:
            return 0
        return len(totals)
