"""Train the tiny task with each loss, from several seeds, at several updates per step.

    python -m tools.bench.losses [losses=grpo,dapo,...] [seeds=3] [updates=1,4] [jobs=CORES]
        [target=0.8] [output=DIR] [key=value ...]

Each run is `recipes/grpo.py conf=qwen3_tiny` on one rank with one thread, `jobs` of them at a time;
other arguments go to the recipe. A run that `output` holds whole already is read, not run again.
The table has, for each loss and number of updates, the steps after which the held-out accuracy
(sampled) was first at `target`, by seed, and the accuracy at the start and the end; it is printed
and written to DIR/table.md. Exit status 1 where a run failed or one with one update did not reach
the target. Left out: step times, which runs side by side would distort.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mesh.rl.losses import LOSSES
from tools import ROOT
from tools.bench.report import hardware

METRIC = "eval/accuracy"
REWARDED = [name for name, loss in LOSSES.items() if not loss.teacher_coef]
"""Losses that need no teacher; for others, say losses=distill teacher.path=DIRECTORY."""


@dataclass(frozen=True)
class Trial:
    """One run: a loss, its updates per step and its seed."""

    loss: str
    updates: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.loss.replace(':', '.')}-u{self.updates}-s{self.seed}"

    def command(self, words: Sequence[str], run_dir: Path) -> list[str]:
        """As a user would write it. One update is the default, so the key is not needed."""
        several = [f"updates_per_step={self.updates}"] if self.updates > 1 else []
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
            *(str(ROOT / "recipes" / "grpo.py"), "conf=qwen3_tiny", "log.tensorboard=false"),
            *(f"loss={self.loss}", f"seed={self.seed}", *several, *words, f"run_dir={run_dir}"),
        ]


@dataclass(frozen=True)
class Curve:
    """Held-out accuracies of a run by step; none where it failed."""

    trial: Trial
    accuracies: tuple[tuple[int, float], ...]

    def reached(self, target: float) -> int | None:
        """The first step at whose evaluation the accuracy was at the target."""
        return next((step for step, value in self.accuracies if value >= target), None)


def main(argv: list[str]) -> int:
    options, words = read_words(argv)
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    trials = [
        Trial(loss, int(updates), seed)
        for updates in options["updates"].split(",")
        for loss in options["losses"].split(",")
        for seed in range(int(options["seeds"]))
    ]
    print(f"{hardware()}; {len(trials)} runs, {options['jobs']} at a time, in {output}", flush=True)
    with ThreadPoolExecutor(int(options["jobs"])) as pool:
        curves = list(pool.map(lambda trial: curve_of(trial, words, output), trials))
    target = float(options["target"])
    table = "\n".join(table_of(curves, target))
    (output / "table.md").write_text(table + "\n")
    print(table)
    short = [c.trial.name for c in curves if missed(c, target)]
    print(f"\nfailed, or not at {target:g}: {', '.join(short) or 'none'}")
    return 1 if short else 0


def read_words(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the recipe's arguments."""
    cores = len(os.sched_getaffinity(0))
    options = {
        "losses": ",".join(REWARDED), "seeds": "3", "updates": "1", "jobs": str(cores),
        "target": "0.8", "output": "",
    }  # fmt: skip
    options |= dict(word.split("=", 1) for word in argv if word.partition("=")[0] in options)
    counts = [options["seeds"], options["jobs"], *options["updates"].split(",")]
    if not all(count.isdecimal() and int(count) for count in counts):
        raise SystemExit(__doc__)
    options["output"] = options["output"] or tempfile.mkdtemp(prefix="bench-losses-")
    return options, [word for word in argv if word.partition("=")[0] not in options]


def curve_of(trial: Trial, words: Sequence[str], output: Path) -> Curve:
    """The curve of a run, which is made unless it lies in `output`."""
    run_dir = output / trial.name
    if not whole(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)  # what an interrupted table left
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (output / f"{trial.name}.log").open("w") as log:
            ended = subprocess.run(
                trial.command(words, run_dir), cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        if ended.returncode:
            print(f"{trial.name}: exit status {ended.returncode}, see {log.name}", flush=True)
            return Curve(trial, ())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    metrics: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found = tuple((entry["step"], entry[METRIC]) for entry in metrics if METRIC in entry)
    print(f"{trial.name}: {found[0][1]:.3f} to {found[-1][1]:.3f}", flush=True)
    return Curve(trial, found)


def whole(run_dir: Path) -> bool:
    """True for a run that has logged its last step: one that was ended early has a model, too."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = yaml.safe_load((run_dir / "config.yaml").read_text())["steps"] if lines else None
    return bool(lines) and json.loads(lines[-1])["step"] == steps


def missed(curve: Curve, target: float) -> bool:
    """True for a run that failed, or that has one update a step and is below the target."""
    short = curve.reached(target) is None
    return not curve.accuracies or (short and curve.trial.updates == 1)


def table_of(curves: Sequence[Curve], target: float) -> list[str]:
    """Rows of a Markdown table, one for each loss and number of updates."""
    rows = [
        f"| loss | updates | start | steps to {target:g}, by seed | accuracy at the end, by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys((c.trial.loss, c.trial.updates) for c in curves):
        own = [c for c in curves if (c.trial.loss, c.trial.updates) == key]
        ran = [c for c in own if c.accuracies]
        start = f"{sum(c.accuracies[0][1] for c in ran) / len(ran):.3f}" if ran else "-"
        steps = ", ".join(str(c.reached(target) or "-") for c in own)
        ends = ", ".join(f"{c.accuracies[-1][1]:.3f}" if c.accuracies else "failed" for c in own)
        rows.append(f"| `{key[0]}` | {key[1]} | {start} | {steps} | {ends} |")
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
