"""tools.validate_grid as a command: a point of the grid that holds, and one that is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def grid(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.validate_grid", "ranks=1", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_a_point_that_holds_has_its_rungs_and_a_refused_one_its_log(tmp_path):
    words = ["losses=gspo", "updates=2", "validate.steps=1", "validate.sequences=9"]
    made = grid(*words, "truncated=yes", f"output={tmp_path}")
    assert made.returncode == 0, made.stdout + made.stderr
    row = (tmp_path / "grid.md").read_text().splitlines()[2]
    assert row.startswith("| `gspo` | 2 | yes | ") and row.endswith(" | L0, L1, L2 | equal |")
    assert (tmp_path / "gspo-u2-truncated" / "validation.json").is_file()
    refused = grid("losses=dapo", "updates=3", "truncated=no", f"output={tmp_path}")
    assert refused.returncode == 1 and "ended without a report" in refused.stdout
    assert "updates_per_step=3" in (tmp_path / "dapo-u3.log").read_text()
