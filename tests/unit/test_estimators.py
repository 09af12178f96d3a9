"""pass@k and majority@k against a count of all subsets, bootstrap intervals against formulas.

Seconds.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.rl.estimators import (
    bootstrap,
    interval,
    interval_of,
    majority_at_k,
    mean_of,
    pass_at_k,
)


@pytest.mark.parametrize("num_samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples):
    for num_correct in range(num_samples + 1):
        right = [index < num_correct for index in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(combinations(right, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_1_is_the_share_of_right_samples_and_k_of_all_is_any():
    assert [pass_at_k(4, correct, 1) for correct in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [pass_at_k(4, correct, 4) for correct in range(5)] == [0, 1, 1, 1, 1]


def counted(votes: list[str | None], correct: list[bool], k: int) -> float:
    """majority@k, one subset after the other."""
    total, subsets = Fraction(0), list(combinations(range(len(votes)), k))
    for subset in subsets:
        counts = Counter(votes[i] for i in subset if votes[i] is not None)
        winners = [vote for vote in counts if counts[vote] == max(counts.values())]
        for winner in winners:
            mine = [correct[i] for i, vote in enumerate(votes) if vote == winner]
            total += Fraction(sum(mine), len(mine) * len(winners))
    return float(total / len(subsets))


SAMPLES = st.tuples(st.sampled_from("abc") | st.none(), st.booleans())


@given(st.lists(SAMPLES, min_size=1, max_size=7))
def test_majority_at_k_is_the_mean_of_the_votes_of_all_subsets(samples):
    votes, correct = ([sample[side] for sample in samples] for side in (0, 1))
    for k in range(1, len(samples) + 1):
        assert majority_at_k(votes, correct, k) == counted(votes, correct, k)


@pytest.mark.parametrize(
    ("votes", "correct", "k", "expected"),
    [
        ("aab", (1, 1, 0), 3, 1.0),
        ("aab", (0, 0, 1), 3, 0.0),
        ("ab", (1, 0), 2, 0.5),  # a tie
        ("aabbc", (1, 1, 0, 0, 0), 5, 0.5),
        ("abc", (1, 0, 0), 1, 1 / 3),  # that of one sample is pass@1
        ("a--", (1, 0, 0), 3, 1.0),  # who says nothing does not vote
        ("---", (0, 0, 0), 2, 0.0),
        ("a--", (1, 0, 0), 2, 2 / 3),
    ],
)
def test_majority_by_hand(votes, correct, k, expected):
    said = [None if vote == "-" else vote for vote in votes]
    assert majority_at_k(said, [bool(right) for right in correct], k) == expected


def test_many_samples_are_no_wait():
    numbers = random.Random(0)
    votes = [str(int(numbers.expovariate(0.9))) for _ in range(128)]
    found = majority_at_k(votes, [vote == "0" for vote in votes], 64)
    assert 0.9 < found <= 1.0


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    numbers = random.Random(0)
    column = [[numbers.gauss(0, 1) for _ in range(3)] for _ in range(400)]
    means = [sum(problem) / 3 for problem in column]
    error = float(np.std(means)) / math.sqrt(400)
    low, high = interval_of(column)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (low + high) / 2 == pytest.approx(mean_of(column), abs=0.1 * error)
    assert interval_of(column) == (low, high), "it repeats"


def test_differences_are_paired():
    """Two columns that differ by 0.1 in every problem differ by it in every resample, however much
    the problems differ; alone they have wide intervals."""
    numbers = random.Random(0)
    one = [[numbers.gauss(0, 1)] for _ in range(50)]
    other = [[value + 0.1] for (value,) in one]
    means = bootstrap(one, other)
    low, high = interval(means[1] - means[0])
    assert low == pytest.approx(0.1, abs=1e-12) and high == pytest.approx(0.1, abs=1e-12)
    ends = interval(means[0])
    assert ends[1] - ends[0] > 0.4


def test_problems_without_a_value_count_nothing():
    column = [[1.0], [], [0.0, 1.0], []]
    assert mean_of(column) == 2 / 3 and math.isnan(mean_of([[], []]))
    low, high = interval_of(column)
    assert 0.5 <= low <= 2 / 3 <= high <= 1.0
