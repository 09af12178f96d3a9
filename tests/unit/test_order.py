"""Which row a draw takes: each once per epoch, weights exactly, and nothing but counters."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest

from mesh.tasks.order import BLOCK, Epochs, Mixture, key_of, permuted, shares


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_permuted_is_a_permutation_that_its_key_chooses(size):
    orders = {tuple(permuted(i, size, key) for i in range(size)) for key in range(40)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(orders) >= min(40, size)


def test_all_permutations_are_about_equally_likely():
    counts = Counter(tuple(permuted(i, 4, key_of("x", n)) for i in range(4)) for n in range(4800))
    assert len(counts) == 24 and all(120 < count < 290 for count in counts.values())


def test_every_row_is_drawn_once_in_each_epoch_and_epochs_differ():
    epochs = Epochs(50, seed=3)
    orders = [tuple(epochs.row(e * 50 + i) for i in range(50)) for e in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 3
    assert tuple(Epochs(50, seed=4).row(i) for i in range(50)) not in orders
    assert [Epochs(3, 3, shuffle=False).row(i) for i in range(5)] == [0, 1, 2, 0, 1]


def test_a_refill_draws_different_rows_in_each_round_and_step():
    epochs = Epochs(20, seed=0)
    rows = {(s, r): [epochs.refill(s, r, i) for i in range(20)] for s in (0, 1) for r in (1, 2)}
    assert all(sorted(drawn) == list(range(20)) for drawn in rows.values())
    assert len({tuple(drawn) for drawn in rows.values()}) == 4
    assert sorted(epochs.refill(0, 1, 20 + i) for i in range(20)) == list(range(20))


def test_a_mixture_has_its_weights_in_every_block_and_each_set_its_positions_in_turn():
    mixture = Mixture(shares([3, 1]), seed=1)
    draws = [mixture.draw(position) for position in range(3 * BLOCK)]
    for block in range(3):
        part = draws[block * BLOCK : (block + 1) * BLOCK]
        assert Counter(which for which, _ in part) == {0: 750, 1: 250}
    for which, count in ((0, 750), (1, 250)):
        assert sorted(place for w, place in draws if w == which) == list(range(3 * count))
    runs = re.findall("1+", "".join(str(which) for which, _ in draws))
    assert len(runs) > 400 and max(map(len, runs)) < 12  # mixed, not one set after the other
    refill = [mixture.refill(5, 1, index) for index in range(BLOCK)]
    assert Counter(which for which, _ in refill) == {0: 750, 1: 250} and refill != draws[:BLOCK]


def test_shares_add_up_and_none_is_lost():
    assert shares([1, 1, 1]) == (334, 333, 333) and shares([0.5, 2]) == (200, 800)
    with pytest.raises(ValueError, match="below one in 1000 draws"):
        shares([1, 5000])


def test_a_row_of_a_million_costs_microseconds():
    epochs = Epochs(1_000_000, seed=0)
    started = time.process_time()
    rows = [epochs.row(10**9 + i) for i in range(2000)]
    assert len(set(rows)) == 2000 and time.process_time() - started < 0.5
