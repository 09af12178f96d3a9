"""Real runs whose report page is tested: made once per session of tests, by all workers together.

They take about 40 s on one core. The names are what a reader of the page would say of them.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from foreground import Foreground, lines_of
from launching import REPOSITORY, Run, runs

EVALUATED = ["eval.every=4", "eval.num_samples=2"]
SMALL = ["conf=qwen3_tiny", "num_prompts=16", "group_size=4", *EVALUATED, "eval.num_prompts=16"]
CALCULATOR = ["conf=calculator_tiny", "task_args.digits=1", "eval.num_prompts=16"]
NAMES = ("tiny", "calculator", "collapsed", "diverged", "resumed", "split")


def made_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The runs by name. The first worker that asks makes them, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made, outputs = root / "shown_runs", root / "shown_runs.json"
    with (root / "shown_runs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outputs.exists():
            made.mkdir()
            outputs.write_text(json.dumps({name: r.output for name, r in make(made).items()}))
    found = json.loads(outputs.read_text())
    return {name: Run(made / name / "run", found[name]) for name in NAMES}


def make(root: Path) -> dict[str, Run]:
    stopped = root / "resumed" / "run"
    asked = {
        "tiny": ("grpo", ["conf=qwen3_tiny", "steps=12", *EVALUATED, "eval.num_prompts=64"]),
        "warm": ("sft", [*CALCULATOR, "model.init=random", "sft.steps=40", "sft.batch_size=64"]),
        "calculator": ("grpo", [*CALCULATOR, f"model.path={root / 'warm' / 'run' / 'model'}",
                                "steps=3", "num_prompts=8", "group_size=4"]),
        "collapsed": ("grpo", [*SMALL, "task=report_tasks:Shortest", "trainer.lr=0.003",
                               "trainer.warmup_steps=0", "steps=24"]),
        "diverged": ("grpo", [*SMALL, "trainer.lr=0.03", "trainer.warmup_steps=0", "steps=12"]),
        "on": ("grpo", [f"resume={stopped}", f"steps={stop(stopped) + 4}"]),
    }  # fmt: skip
    made = runs(root, 1, asked, path=REPOSITORY / "tests")
    two = ["conf=qwen3_tiny_split", *SMALL[1:], "waves=2", "steps=4"]
    resumed = {"resumed": Run(stopped, made["on"].output)}
    return made | resumed | runs(root, 2, {"split": ("grpo", two)})


def stop(run_dir: Path) -> int:
    """Make a run that SIGTERM stops after a few of its many steps: how many it took."""
    job = Foreground("grpo.py", 1, *SMALL, "steps=1000", f"run_dir={run_dir}")
    job.wait_for(lambda: len(lines_of(run_dir / "metrics.jsonl")) > 5)
    job.popen.terminate()
    _, err = job.popen.communicate(timeout=60)
    assert job.popen.returncode == 0, err
    return len(lines_of(run_dir / "metrics.jsonl")) - 1
