"""tools/memory.py on a real run of a few steps."""

from __future__ import annotations

import json

from tools.memory import main


def test_the_command_watches_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        "conf=qwen3_tiny", "steps=8", "num_prompts=2", "group_size=2", "eval.num_prompts=4",
        "eval.num_samples=1", "first=2", "limit=1e9", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"growth over steps 2 to 8 of {tmp_path / 'run'}\n" in out
    names = {"rank 0 private", "rank 0 resident"}
    assert {line.split("  ")[0] for line in out.splitlines() if "kB a step" in line} == names
    rows = map(json.loads, (tmp_path / "run" / "memory.jsonl").read_text().splitlines())
    points = {row["name"]: row["points"] for row in rows}
    assert points.keys() == names
    assert [step for step, _ in points["rank 0 private"]][-1] == 8
    assert all(1e5 < kb < 1e7 for found in points.values() for _, kb in found)
