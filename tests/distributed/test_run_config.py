"""The saved configuration of a run as conf= of the programs that use its model. About 30 s."""

from __future__ import annotations

import json

from launching import launch

OWN = ["task_args.min_length=6", "task_args.max_length=7", "generator.temperature=0.4"]
SMALL = ["num_prompts=8", "group_size=4", "steps=1", "eval.num_prompts=24", "log.tensorboard=false"]


def test_a_runs_own_configuration_gives_its_numbers_and_another_a_warning(tmp_path):
    run, output = tmp_path / "run", tmp_path / "eval.json"
    launch("recipes/grpo.py", 1, "conf=qwen3_tiny", *SMALL, *OWN, f"run_dir={run}")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    words = [f"model.path={run / 'model'}", f"eval.output={output}"]
    found = {}
    for conf in (f"{run / 'config.yaml'}", "qwen3_tiny"):
        said = launch("recipes/evaluate.py", 1, f"conf={conf}", *words, "eval.num_prompts=24")
        found[conf] = json.loads(output.read_text())
        assert set(found[conf].pop("intervals")) <= set(found[conf])
        warnings = [line for line in said.stdout.splitlines() if line.startswith("warning")]
        assert len(warnings) == (conf == "qwen3_tiny")
    assert "task_args.min_length=3 (the run: 6), task_args.max_length=5 (the run: 7)" in warnings[0]
    own, other = found.values()
    assert own == {key: last[key] for key in own} and own != other
    for conf, count in ((f"{run / 'config.yaml'}", 0), ("qwen3_tiny", 1)):
        said = launch("recipes/generate.py", 1, f"conf={conf}", words[0])
        assert said.stdout.count("warning: ") == count and said.stdout.count("> -> ") == 8
