"""The start-up self-test on two ranks, of which one has a broken kernel."""

from __future__ import annotations

from pathlib import Path

from launching import launch


def test_what_fails_on_one_rank_is_moved_on_all(tmp_path: Path):
    launch("tests/programs/selftest_program.py", 1, str(tmp_path))
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].endswith("moved to our own kernels: broken [K 160, N 48] [(160, 48)]")
