"""Run a recipe under torchrun, as a user would, and measure it from outside."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from tools import ROOT
from tools.processes import children, cpu_seconds, peak_rss, rank_of

POLL_SECONDS = 0.1

Growth = tuple[int, float, float]


@dataclass
class MeasuredRun:
    """One finished run. Both times cover the whole command, from start to exit.

    cpu_seconds: all ranks together; far below ranks x wall if the machine was busy.
    peak_rss: bytes by rank, the kernel's high-water mark, shared libraries included.
    peak_gpu: bytes in use by everything on the first GPU, minus those in use before.
    growth: sizes that metrics.jsonl was seen to have [bytes], when it had been written [s], and the
    CPU time of all ranks until then [s], up to a look later.
    lines: wall and CPU seconds between two lines of it, by the place of the later one.
    """

    run_dir: Path
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: dict[int, int] = field(default_factory=dict)
    peak_gpu: int = 0
    growth: list[Growth] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[int, tuple[float, float]] = field(default_factory=dict)


def run_recipe(recipe: str, processes: int, words: list[str], run_dir: Path) -> MeasuredRun:
    """Run `recipes/RECIPE.py` with `key=value` arguments; its output goes to `RUN_DIR.log`.

    Raises SystemExit with its last lines if it fails.
    """
    log = run_dir.with_suffix(".log")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"),
        *(str(ROOT / "recipes" / f"{recipe}.py"), *words, f"run_dir={run_dir}"),
    ]
    measured, gpu = MeasuredRun(run_dir), gpu_bytes()
    began, cpu_began = time.monotonic(), children_cpu_seconds()
    with log.open("w") as output:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while launcher.poll() is None:
                observe(launcher.pid, measured, gpu)
                time.sleep(POLL_SECONDS)
        finally:
            launcher.terminate()
            launcher.wait()
    measured.wall_seconds = time.monotonic() - began
    measured.cpu_seconds = children_cpu_seconds() - cpu_began
    if launcher.returncode:
        last = "\n".join(log.read_text().splitlines()[-40:])
        failed = f"exit status {launcher.returncode} of {' '.join(command)}"
        raise SystemExit(f"{last}\n\n{failed}\nits whole output: {log}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    measured.metrics = [json.loads(line) for line in lines]
    measured.lines = seconds_by_line(measured.growth, lines)
    return measured


def seconds_by_line(
    growth: Sequence[Growth], lines: Sequence[str]
) -> dict[int, tuple[float, float]]:
    """Wall and CPU seconds from the line before to each line of a log that was seen to grow, by its
    place; lines that came between two looks share theirs. Of the first line nothing is known.
    """
    ends = list(accumulate(len(line.encode()) + 1 for line in lines))
    found: dict[int, tuple[float, float]] = {}
    known, since, before = 0, 0.0, 0.0
    for size, when, cpu in growth:
        whole = bisect_right(ends, size)
        if whole <= known:
            continue
        if known:
            new = whole - known
            found |= dict.fromkeys(
                range(known, whole), ((when - since) / new, (cpu - before) / new)
            )
        known, since, before = whole, when, cpu
    return found


def observe(launcher: int, measured: MeasuredRun, gpu_before: int) -> None:
    """Record what the launcher's ranks use at this moment, and how far they are."""
    cpu = 0.0
    for pid in children(launcher):
        try:
            rank, peak, used = rank_of(pid), peak_rss(pid), cpu_seconds(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended
        if rank is not None:
            measured.peak_rss[rank] = max(measured.peak_rss.get(rank, 0), peak)
            cpu += used
    measured.peak_gpu = max(measured.peak_gpu, gpu_bytes() - gpu_before)
    with suppress(FileNotFoundError):
        log = (measured.run_dir / "metrics.jsonl").stat()
        measured.growth.append((log.st_size, log.st_mtime_ns / 1e9, cpu))


def children_cpu_seconds() -> float:
    """CPU time of this process's finished children and their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def gpu_bytes() -> int:
    """Memory in use on the first GPU, by whichever process [bytes]; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info(0)
    return total - free
