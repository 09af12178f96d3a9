"""Draws of training prompts: which of a step's rounds, and which places in the step they have."""

from __future__ import annotations

from dataclasses import dataclass

ROUNDS_OF_DRAW = 10_000
"""Rounds that one draw of a step may use: its own, and those that replace prompts of no use."""


@dataclass(frozen=True)
class Draw:
    """A request for training prompts: `num` of a step, in a round of it.

    A prompt is a pure function of (seed, step, round, index); rounds after the first draw more for
    a step. first_id: the place in the step of index 0, after those of the rounds before.
    `refill_draw` says which rounds a step that is refilled has.
    """

    step: int
    num: int
    round: int = 0
    first_id: int = 0

    @property
    def refill(self) -> int:
        """Which refill of the step it is; 0: the step's first draw."""
        return self.round // ROUNDS_OF_DRAW


def refill_draw(step: int, refill: int, num: int, num_prompts: int) -> Draw:
    """The draw of `num` more prompts for a step of `num_prompts`, in its refill 1, 2, ..."""
    assert num <= num_prompts, "places of two refills would overlap"
    return Draw(step, num, ROUNDS_OF_DRAW * refill, num_prompts * refill)
