"""Memory of a long run: what is freed is returned, and a growth is measured as it is."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from mesh.lifecycle.memory import EVERY, trim
from tools.memory import fit, grows


def resident() -> float:
    """MB"""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def test_what_is_freed_goes_back_to_the_system_every_so_many_steps():
    """200 MB in pieces that glibc keeps in its heap, below one that stays."""
    pieces = [torch.ones(25_000) for _ in range(2_000)]
    held = pieces.pop()
    full = resident()
    pieces.clear()
    trim(EVERY + 1)
    assert resident() > full - 50
    trim(2 * EVERY)
    assert resident() < full - 150
    assert float(held.sum()) == 25_000


def test_the_fit_gives_slope_error_and_start():
    """Against the textbook: residuals +-1 about 3 + 2 x."""
    line = fit([(0, 4.0), (1, 4.0), (2, 6.0), (3, 10.0)])
    assert (line.slope, line.start) == pytest.approx((2.0, 3.0))
    assert line.error == pytest.approx(math.sqrt(4 / 2 / 5))


def test_noise_is_no_growth_and_a_kilobyte_a_step_is():
    noise = random.Random(0).gauss
    steps = range(500, 5000, 10)
    flat = fit([(step, 6e5 + noise(0, 2000)) for step in steps])
    grown = fit([(step, 6e5 + 2 * step + noise(0, 2000)) for step in steps])
    assert abs(flat.slope) < 3 * flat.error and abs(grown.slope - 2) < 3 * grown.error
    assert not grows(flat, 1.0) and grows(grown, 1.0)
    assert grows(fit([(1, 1.0)]), 1.0)  # nothing was measured
