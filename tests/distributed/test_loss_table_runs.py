"""tools.bench.losses as a command: real runs of one step, and one that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def table(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench.losses", "seeds=1", "jobs=2", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_each_loss_has_a_row_and_a_failed_run_a_log(tmp_path):
    words = ["losses=gspo,rloo", "updates=2", "steps=1", "eval.num_prompts=8"]
    made = table(*words, f"output={tmp_path}")
    assert made.returncode == 0, made.stdout + made.stderr
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| `gspo`", "| `rloo`"]
    assert rows[2] in made.stdout and (tmp_path / "gspo-u2-s0" / "metrics.jsonl").is_file()
    metrics = tmp_path / "gspo-u2-s0" / "metrics.jsonl"
    kept = metrics.read_text().splitlines()
    metrics.write_text(kept[0] + "\n")  # as if it had been interrupted
    assert table(*words, f"output={tmp_path}").returncode == 0
    assert len(metrics.read_text().splitlines()) == len(kept) == 2
    failed = table("losses=dapo", "stepz=1", f"output={tmp_path}")
    assert failed.returncode == 1 and "| `dapo` | 1 | - | - | failed |" in failed.stdout
    assert "did you mean steps" in (tmp_path / "dapo-u1-s0.log").read_text()
