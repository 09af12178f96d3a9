"""Estimates from several samples of each problem: pass@k, majority@k, and bootstrap intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Share of resamples whose mean lies in an interval."""

RESAMPLES = 10_000
SEED = 0
DRAWN_AT_ONCE = 1 << 20  # indices of resamples that are held in memory


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(votes: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Unbiased estimate of the chance that the vote of k samples is right (self-consistency, Wang
    et al. 2022, arXiv:2203.11171): its mean over all subsets of k of the samples, exactly.

    votes: the answer of each sample; None: it does not vote. The answer with most votes wins; of
    those that tie, each counts with the same share. A winner counts with the share of its samples
    that are correct. A subset in which nobody votes is wrong.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    pairs = zip(votes, correct, strict=True)
    right = Counter(vote for vote, is_right in pairs if vote is not None and is_right)
    answers = tuple(sorted((count, right[vote]) for vote, count in counts.items()))
    return _majority(len(votes) - counts.total(), answers, k)


@lru_cache(maxsize=4096)
def _majority(silent: int, answers: tuple[tuple[int, int], ...], k: int) -> float:
    """majority@k of `silent` samples without a vote, and of answers by (samples, correct ones)."""
    num_samples = silent + sum(count for count, _ in answers)
    won = Fraction(0)
    for most in range(1, min(k, max((count for count, _ in answers), default=0)) + 1):
        won += _won_with(silent, answers, k, most)
    return float(won / math.comb(num_samples, k))


def _won_with(silent: int, answers: Sequence[tuple[int, int]], k: int, most: int) -> Fraction:
    """The sum over all subsets of k whose winners have exactly `most` votes each of the winners'
    mean share of correct samples.

    Answers are added one by one. subsets: by (samples drawn, winners so far), the number of ways,
    and the sum of the winners' shares over them.
    """
    scale = math.lcm(*(count for count, _ in answers))
    room = sum(min(count, most) for count, _ in answers)  # that the answers to come can fill
    subsets = {(n, 0): (math.comb(silent, n), 0) for n in range(min(silent, k) + 1)}
    for count, right in answers:
        room -= min(count, most)
        longer: dict[tuple[int, int], tuple[int, int]] = {}
        for (drawn, winners), (ways, shares) in subsets.items():
            for votes in range(min(count, most, k - drawn) + 1):
                if drawn + votes + room < k:
                    continue
                wins = votes == most
                share = scale * right // count * ways if wins else 0
                key = drawn + votes, winners + wins
                before, times = longer.get(key, (0, 0)), math.comb(count, votes)
                longer[key] = before[0] + times * ways, before[1] + times * (shares + share)
        subsets = longer
    return sum(
        (
            Fraction(shares, winners * scale)
            for (_, winners), (_, shares) in subsets.items()
            if winners
        ),
        Fraction(0),
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, with its interval."""

    mean: float
    low: float
    high: float


def mean_of(values: Sequence[Sequence[float]]) -> float:
    """The mean of all values of all problems, with an exactly rounded sum; NaN of none."""
    flat = [value for problem in values for value in problem]
    return math.fsum(flat) / len(flat) if flat else math.nan


def bootstrap(*columns: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    """The means of resamples of the problems, for each of the columns; all see the same resamples,
    so that differences are paired. A column has the values of each problem, as `mean_of` takes.

    The seed is fixed: the same values give the same intervals (percentiles, Efron 1979).
    """
    num = len(columns[0])
    sums = np.array([[math.fsum(v) for v in column] for column in columns], np.float64)
    sizes = np.array([[len(v) for v in column] for column in columns], np.float64)
    numbers = np.random.default_rng(SEED)
    found: list[NDArray[np.float64]] = []
    drawn, at_once = 0, max(1, DRAWN_AT_ONCE // num)
    while drawn < RESAMPLES:
        rows = min(at_once, RESAMPLES - drawn)
        index_BP = numbers.integers(0, num, (rows, num))
        total_CB, size_CB = sums[:, index_BP].sum(-1), sizes[:, index_BP].sum(-1)
        with np.errstate(invalid="ignore"):  # none of the problems drawn has a value
            found.append(total_CB / size_CB)
        drawn += rows
    return list(np.concatenate(found, axis=1))


def interval(means_B: NDArray[np.float64]) -> tuple[float, float]:
    """The interval that holds LEVEL of the resamples' means."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(means_B, [tail, 1 - tail])
    return float(low), float(high)


def interval_of(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The interval of the mean over problems."""
    return interval(bootstrap(values)[0])
