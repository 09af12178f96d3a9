"""Fit the growth of a run's memory: kB a step of every rank, with its standard error.

    python tools/memory.py conf=qwen3_tiny steps=5000 [ranks=1] [first=500] [limit=1] [run_dir=DIR]

Runs recipes/grpo.py with the other arguments, and reads what each rank holds at the end of every
step from /proc: its private memory (`RssAnon`) and all that is resident (`VmRSS`, with the pages of
libraries). `kept` is the same right after it has returned free memory to the system, every so many
steps (`mesh/lifecycle/memory.py`). A line through steps `first` to the last one gives the growth;
what a run needs at its start, such as caches that fill, comes before. On a GPU the fullest card's
memory in use is fitted too (`gpu_gb/*` of metrics.jsonl). Exit status 1 if a growth is `limit` kB a
step or more.

A small step is enough: `num_prompts=4 group_size=4` takes 0.06 s. The samples are in
RUN_DIR/memory.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from mesh.lifecycle.memory import EVERY
from mesh.runs.lines import read_lines
from tools import ROOT
from tools.processes import children, rank_of

OPTIONS = {"ranks": "1", "first": "500", "limit": "1"}
KINDS = {"RssAnon": "private", "VmRSS": "resident"}
POLL_SECONDS = 0.01
Points = list[tuple[float, float]]
"""(step, kB)"""


@dataclass(frozen=True)
class Line:
    """A fitted line: growth per step, its standard error, and the value at the first step."""

    slope: float
    error: float
    start: float


def main(argv: list[str]) -> int:
    options, words = read_options(argv)
    named = [word.partition("=")[2] for word in words if word.startswith("run_dir=")]
    run_dir = Path(named[-1] if named else tempfile.mkdtemp(prefix="mesh-memory-") + "/run")
    words = [word for word in words if not word.startswith("run_dir=")]
    status, points = watch(int(options["ranks"]), run_dir, [*words, f"run_dir={run_dir}"])
    if status:
        print(f"the run ended with status {status}: {run_dir.with_suffix('.out')}")
        return status
    points |= on_gpus(run_dir / "metrics.jsonl")
    first = float(options["first"])
    inside = {name: [p for p in found if p[0] >= first] for name, found in points.items()}
    lines = {name: fit(found) for name, found in inside.items() if len(found) > 2}
    steps = max(step for found in points.values() for step, _ in found)
    print(f"growth over steps {first:.0f} to {steps:.0f} of {run_dir}\n")
    print("\n".join(f"{name:24} {shown(line)}" for name, line in lines.items()))
    grown = [line for line in lines.values() if grows(line, float(options["limit"]))]
    return 1 if grown or not lines else 0


def read_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the words of the recipe."""
    pairs = {word: word.partition("=") for word in argv}
    own = {name: value for name, _, value in pairs.values() if name in OPTIONS}
    return OPTIONS | own, [word for word in argv if pairs[word][0] not in OPTIONS]


def watch(ranks: int, run_dir: Path, words: Sequence[str]) -> tuple[int, dict[str, Points]]:
    """Run the recipe to its end. (exit status, kB at the end of each step by rank and kind)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "recipes" / "grpo.py")]
    points: dict[str, Points] = {}
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(run_dir.with_suffix(".out"), "w") as output:
        job = subprocess.Popen([*command, *words], stdout=output, stderr=subprocess.STDOUT)
        for step in steps_of(job, run_dir / "metrics.jsonl"):
            pids = (
                [job.pid]
                if ranks == 1
                else [p for p in children(job.pid) if rank_of(p) is not None]
            )
            sample(step, pids, points)
    with open(run_dir / "memory.jsonl", "w") as file:
        file.writelines(json.dumps({"name": n, "points": p}) + "\n" for n, p in points.items())
    return job.returncode, points


def steps_of(job: subprocess.Popen, metrics: Path) -> Iterator[int]:
    """The newest step of a running job whenever it has logged one."""
    logged, size = -1, 0
    while job.poll() is None:
        time.sleep(POLL_SECONDS)
        if not metrics.exists() or metrics.stat().st_size == size:
            continue
        with open(metrics, "rb") as file:
            file.seek(size)
            logged += file.read().count(b"\n")
            size = file.tell()
        yield logged


def sample(step: int, pids: Sequence[int], points: dict[str, Points]) -> None:
    """Add what these processes hold; one that has just ended holds nothing more."""
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for field, kind in KINDS.items():
            found = [line.split()[1] for line in status.splitlines() if line.startswith(field)]
            if found:
                name = f"rank {rank_of(pid) or 0} {kind}"
                for series in (name, *([f"{name}, kept"] if step and step % EVERY == 0 else [])):
                    points.setdefault(series, []).append((float(step), float(found[0])))


def on_gpus(metrics: Path) -> dict[str, Points]:
    """The fullest GPU's memory in use [kB] at the end of each phase."""
    points: dict[str, Points] = {}
    for line in read_lines(metrics):
        for key in line:
            if key.startswith("gpu_gb/"):
                points.setdefault(key, []).append((line["step"], line[key] * 1e6))
    return points


def fit(points: Points) -> Line:
    """The line of least squares; its error is NaN for less than three points."""
    if len({x for x, _ in points}) < 2:
        return Line(math.nan, math.nan, math.nan)
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    rest = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points)
    free = len(points) - 2
    error = math.sqrt(rest / free / spread) if free else math.nan
    return Line(slope, error, y_mean + slope * (points[0][0] - x_mean))


def grows(line: Line, limit: float) -> bool:
    """True if the growth reaches the limit; where nothing was fitted it counts as growth."""
    return not line.slope < limit


def shown(line: Line) -> str:
    return f"{line.slope:8.3f} +- {line.error:.3f} kB a step, from {line.start / 1e3:.1f} MB"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
