"""Dynamic sampling: which groups of a step teach something, and how many more prompts it takes.

A group whose rollouts are all right or all wrong has advantages of 0. DAPO (arXiv:2503.14476,
section 3.2, eq. 11) leaves such groups out and draws more prompts until the batch is full, so that
each step has the gradient of the same number of groups. Everything here is a function of the step's
outlines, so it is the same on any mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from mesh.rl.advantages import equal_groups, rewards_of
from mesh.rl.step import prompt_ids_of
from mesh.tasks.correct import is_correct
from mesh.types import Outline, Wave

REWARD, CORRECT = "reward", "correct"


def unequal_groups(wave: Wave, group_size: int, on: str, task: Any) -> list[int]:
    """The prompts of the wave whose groups are not equal in the quantity `on`, in order."""
    equal_P = equal_groups(quantity_of(wave, group_size, on, task))
    pairs = zip(prompt_ids_of(wave, group_size), equal_P.tolist(), strict=True)
    return [prompt_id for prompt_id, equal in pairs if not equal]


def quantity_of(wave: Wave, group_size: int, on: str, task: Any) -> Tensor:
    """float64 values_PG of the wave's rollouts: `reward`, `correct` as 0 or 1, or a part of their
    scores, 0 where a rollout has none of that name. Raises ValueError where no rollout has one.
    """
    if on == REWARD:
        return rewards_of(wave, group_size)
    if on == CORRECT:
        values = [float(is_correct(task, o.reward, o.correct)) for o in wave.outlines]
    else:
        refuse_unknown_part(wave.outlines, on)
        values = [dict(o.parts).get(on, 0.0) for o in wave.outlines]
    return torch.tensor(values, dtype=torch.float64).view(-1, group_size)


def refuse_unknown_part(outlines: Sequence[Outline], name: str) -> None:
    """Raise ValueError where none of the rollouts has a part of this name."""
    parts = sorted({part for o in outlines for part, _ in o.parts})
    if outlines and name not in parts:
        known = ", ".join([REWARD, CORRECT, *parts])
        raise ValueError(
            f"refill_on={name}: no score has a part of that name; start a new run with one of "
            f"{known}"
        )


def next_round(num_groups: int, found: int, drawn: int) -> int:
    """Prompts to draw next: as many as fill the step if the share of the prompts so far whose
    groups are of use stays the same, at most `num_groups`. found: of `drawn` prompts.
    """
    missing = num_groups - found
    return min(num_groups, ceil(missing * drawn / found)) if found else num_groups
