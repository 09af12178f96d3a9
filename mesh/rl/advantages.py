"""Advantages: a rollout is judged against the other rollouts of its prompt, or of the whole step.

Rewards are float64 from the score function on. Advantages are computed with exactly rounded sums
and rounded to float32 once, so the bits depend on the rewards alone: of the group, or, whitened, of
the step; not on the order of rollouts, nor on how many groups a wave or a rank holds.

Rewards that differ by the rounding of their sums are equal: divided by their own deviation, the
rounding of 0.7 + 0.2 + 0.1 against 1.0 would become a gradient. `equal_groups` alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, isfinite, sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from mesh.types import LARGEST_REWARD, Wave

Advantage = Literal["std", "centred", "leave_one_out", "mean", "whitened", "centred_whitened"]

OF_STEP: frozenset[str] = frozenset({"whitened", "centred_whitened"})
"""Kinds that need the groups of a whole step in one call."""

DIVIDED: frozenset[str] = frozenset({"std", "mean"}) | OF_STEP
"""Kinds that divide by a statistic, to which an epsilon is added."""

ROUNDING = 1e-12
"""The largest difference of equal rewards, relative to the larger of 1 and their magnitude. It is
9,000 roundings of float64, so two sums of 4,500 terms each stay within it; whole numbers up to 1e12
differ by more. The 1 is for sums that cancel: 0.1 + 0.2 - 0.3 is 5.6e-17, not 0."""


def rewards_of(wave: Wave, group_size: int) -> Tensor:
    """float64 rewards_PG of a wave, in the order of its outlines."""
    rewards_R = torch.tensor([o.reward for o in wave.outlines], dtype=torch.float64)
    return rewards_R.view(-1, group_size)


def lengths_of(wave: Wave, group_size: int) -> Tensor:
    """int64 lengths_PG of a wave: loss tokens of each rollout, in the order of its outlines."""
    return torch.tensor([o.length for o in wave.outlines]).view(-1, group_size)


def group_advantages(
    rewards_PG: Tensor, kind: Advantage, eps: float = 1e-6, lengths_PG: Tensor | None = None
) -> Tensor:
    """Advantages of P groups of G rollouts: rewards_PG -> float32 advantages_PG on the CPU.

    `std`: (r - mean) / (std + eps), GRPO's outcome supervision (DeepSeekMath, arXiv:2402.03300,
    section 4.1.2). The paper has neither eps nor the kind of deviation. This is the sample one
    (divisor G - 1), the default of `torch.std`, which TRL and verl call; the population one would
    scale every advantage by sqrt(G / (G - 1)). eps is 1e-6 in verl (`epsilon` of
    compute_grpo_outcome_advantage) and 1e-4 in TRL (GRPOTrainer): with that eps, theirs are these
    advantages. 0 is allowed.
    `centred`: r - mean (Dr. GRPO, arXiv:2503.20783, section 3.2), since dividing by the deviation
    gives questions that are nearly all right or all wrong a larger weight.
    `leave_one_out`: r - mean of the others, which is G / (G - 1) * (r - mean) (RLOO,
    arXiv:2402.14740; verl's compute_rloo_outcome_advantage).
    `mean`: (r - mean) / (mean + eps), for rewards of 0 or more (MaxRL, arXiv:2602.02710,
    algorithm 1).
    `whitened`: (r - mean) / (std + eps) over the loss tokens of the whole step, each of which has
    its rollout's reward (REINFORCE++, arXiv:2501.03262, its global normalisation);
    `centred_whitened`: the same of r minus the group's mean (its variant with baseline). The
    deviation is the sample one, as in verl's masked_whiten. lengths_PG: those tokens; unset: as
    many of each.

    A group of equal rewards (`equal_groups`) gets exactly 0, and for the whitened kinds a step of
    them. Raises ValueError for an unknown kind, for G < 2, for a reward that is not finite or
    beyond LARGEST_REWARD, for `mean` of a reward below 0, and for an advantage beyond float32.
    """
    if kind not in get_args(Advantage):
        raise ValueError(f"advantage={kind!r}: choose one of {', '.join(get_args(Advantage))}")
    if rewards_PG.dim() != 2 or rewards_PG.shape[1] < 2:
        shape = tuple(rewards_PG.shape)
        raise ValueError(f"rewards of shape {shape}: need [P, G] with group_size G of 2 or more")
    rows = rewards_PG.to("cpu", torch.float64).tolist()
    for row_G in rows:
        _check_rewards(row_G, kind)
    if kind != "whitened":
        equal_P = equal_groups(rewards_PG).tolist()
        rows = [
            [0.0] * len(row_G) if equal else _row_advantages(row_G, kind, eps)
            for row_G, equal in zip(rows, equal_P, strict=True)
        ]
    if kind in OF_STEP:
        lengths_PG = torch.ones_like(rewards_PG) if lengths_PG is None else lengths_PG
        rows = _whitened(rows, lengths_PG.tolist(), eps)
    advantages_PG = torch.tensor(rows, dtype=torch.float64).reshape(rewards_PG.shape)
    return rounded(advantages_PG, rewards_PG)


def rounded(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    """The advantages in float32. Raises ValueError naming the group of one that becomes infinite.

    An advantage that was not finite before is not this function's to judge.
    """
    rounded_PG = advantages_PG.to("cpu", torch.float32)
    lost_PG = rounded_PG.isinf() & advantages_PG.cpu().isfinite()
    if lost_PG.any():
        group, sample = lost_PG.nonzero()[0].tolist()
        raise ValueError(
            f"rewards {rewards_PG[group].tolist()} of one group: the advantage "
            f"{advantages_PG[group, sample].item():.6g} is beyond float32, in which the loss is "
            "computed; scale the rewards of the task, or set advantage=std"
        )
    return rounded_PG


def equal_groups(rewards_PG: Tensor) -> Tensor:
    """bool_P on the CPU: the groups whose rewards are equal up to `ROUNDING`, which teach nothing.

    Also for the metric of this name and for drop_equal_groups.
    """
    low_P, high_P, scale_P = _ranges(rewards_PG)
    return high_P - low_P <= ROUNDING * scale_P


def made_equal(rewards_PG: Tensor) -> Tensor:
    """float64 rewards_PG on the CPU, in which the rewards of an equal group are one number: theirs,
    rounded to 40 bits, which is within `ROUNDING`.

    The sum of up to 8,192 such numbers is exact in any order, so their mean is that number and
    their deviation 0, however a user's function computes them in float64.
    """
    _, high_P, scale_P = _ranges(rewards_PG)
    grid_P = torch.ldexp(torch.ones_like(scale_P), torch.frexp(scale_P).exponent - 40)
    common_P = (high_P / grid_P).round() * grid_P
    equal_P = equal_groups(rewards_PG)
    return torch.where(equal_P[:, None], common_P[:, None], rewards_PG.to("cpu", torch.float64))


def _ranges(rewards_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 on the CPU, of each group: lowest, highest, and the larger of 1 and the magnitude."""
    low_P, high_P = rewards_PG.to("cpu", torch.float64).aminmax(dim=1)
    return low_P, high_P, torch.maximum(low_P.abs(), high_P.abs()).clamp(min=1)


def _check_rewards(row_G: Sequence[float], kind: Advantage) -> None:
    if not all(map(isfinite, row_G)):
        raise ValueError(f"rewards {row_G} of one group: every reward must be finite")
    if max(map(abs, row_G)) > LARGEST_REWARD:
        wrong = f"beyond {LARGEST_REWARD:g} their statistics overflow"
        raise ValueError(f"rewards {row_G} of one group: {wrong}; scale the rewards of the task")
    if kind == "mean" and min(row_G) < 0:
        wrong = "the advantage divides by their mean, which has to be that of rewards of 0 or more"
        raise ValueError(
            f"rewards {row_G} of one group: {wrong}; shift the rewards of the task, or set "
            "advantage=std"
        )


def _row_advantages(row_G: Sequence[float], kind: Advantage, eps: float) -> list[float]:
    """Of a group whose rewards are not equal."""
    size, mean = len(row_G), fsum(row_G) / len(row_G)
    centred_G = [reward - mean for reward in row_G]
    if kind in ("centred", "centred_whitened"):
        return centred_G
    if kind == "leave_one_out":
        return [x * size / (size - 1) for x in centred_G]
    if kind == "mean":
        return [x / (mean + eps) for x in centred_G]
    deviation = sqrt(fsum(x * x for x in centred_G) / (size - 1))
    return [x / (deviation + eps) for x in centred_G]


def _whitened(
    rows: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]], eps: float
) -> list[list[float]]:
    """Rows minus their mean over all tokens, divided by the deviation."""
    pairs = [
        (x, n)
        for row_G, lengths_G in zip(rows, lengths, strict=True)
        for x, n in zip(row_G, lengths_G, strict=True)
    ]
    num_tokens = fsum(n for _, n in pairs)
    values_R = torch.tensor([[x for x, n in pairs if n > 0]], dtype=torch.float64)
    if num_tokens < 2 or bool(equal_groups(values_R)):
        return [[0.0] * len(row_G) for row_G in rows]
    mean = fsum(x * n for x, n in pairs) / num_tokens
    deviation = sqrt(fsum(n * (x - mean) ** 2 for x, n in pairs) / (num_tokens - 1))
    return [[(x - mean) / (deviation + eps) for x in row_G] for row_G in rows]
