"""A round of tools/chaos.py on real runs. Its plan and its checks: unit/test_chaos_checks.py."""

from __future__ import annotations

import re

import pytest
from launching import launch

from tools.chaos.plan import plan


@pytest.mark.timeout(900)
def test_killed_while_it_writes_a_checkpoint_and_resumed(tmp_path):
    """One round of a schedule: three runs of two ranks. It died in the phase that was planned."""
    assert plan(2, 33, 2)[0].kill_points[0].phase == "writing"
    words = ["conf=qwen3_tiny", "rounds=2", "ranks=2", "seed=33", "only=0", f"dir={tmp_path}"]
    out = launch("tools/chaos.py", 1, *words, seconds=800).stdout
    (line,) = [line for line in out.splitlines() if line.startswith("round")]
    assert "  fsdp2 -> fsdp2  " in line and "  equal to the bit  " in line
    assert re.search(r"killed in writing of rank [01] after [3-6] steps, gone in", line)
    assert re.search(r"resumed from step [2-5]  ", line)
    assert re.search(r"^writing +1 +0$", out, re.M)
    assert "1 rounds, 1 kills" in out and out.endswith("0 failed\n")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"reference-fsdp2{suffix}" for suffix in ("", ".log", ".phases")}
