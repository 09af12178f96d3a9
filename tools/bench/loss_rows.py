"""Rows of the table of losses: seconds of each, and their ratios to grpo's in the same round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tools.bench.report import spread

WITHIN = 0.03


@dataclass(frozen=True)
class Times:
    """A loss's seconds of training by round, and those of grpo in the same rounds; rest: what a
    whole step takes beside."""

    own: Sequence[float]
    base: Sequence[float]
    rest: float

    def ratios(self, rest: float = 0.0) -> list[float]:
        """To grpo, round by round; rest: seconds that both take as well."""
        pairs = zip(self.own, self.base, strict=True)
        return [(own + rest) / (base + rest) for own, base in pairs]

    def cells(self) -> list[str]:
        """Of training and of a whole step: seconds, and the ratio to grpo."""
        return [
            f"{median(self.own):.3f}",
            spread(self.ratios()),
            f"{median(self.own) + self.rest:.3f}",
            spread(self.ratios(self.rest)),
        ]


@dataclass(frozen=True)
class Timed:
    """A loss and its times: by the clock, and on a GPU those of kernels."""

    loss: str
    updates: int
    clock: Times
    kernels: Times | None = None

    @property
    def missed(self) -> bool:
        """True if a whole step does not take as long as with grpo."""
        judged = self.kernels or self.clock
        return abs(median(judged.ratios(judged.rest)) - 1) > WITHIN

    def cells(self) -> list[str]:
        """Its row of the table."""
        more = self.kernels.cells() if self.kernels else []
        return [f"`{self.loss}`", str(self.updates), *self.clock.cells(), *more]


def heads(kernels: bool) -> list[str]:
    """Of the table's columns; kernels: those of a GPU are in it."""
    more = ["kernels of train s", "to grpo", "kernels of step s", "to grpo"] if kernels else []
    return ["loss", "updates", "train s", "to grpo", "whole step s", "to grpo", *more]
