"""Evaluation on ranks of which one has no prompt."""

from __future__ import annotations

import json

from launching import launch


def test_fewer_prompts_than_replicas_leave_one_an_empty_share(tmp_path):
    """A replica without prompts joins in the reduction: the numbers are those of one rank."""
    seen = []
    for num_ranks in (1, 2):
        output = tmp_path / f"{num_ranks}.json"
        words = ["conf=qwen3_tiny", "eval.num_prompts=1", f"eval.output={output}"]
        launch("recipes/evaluate.py", num_ranks, *words)
        seen.append(json.loads(output.read_text()))
    assert seen[0] == seen[1]
