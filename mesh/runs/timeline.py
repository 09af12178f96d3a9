"""`timeline.jsonl`: who worked when, and who waited for whom, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh.layout.meshes import Layout
from mesh.lifecycle.timers import Measured
from mesh.runs.metrics import write_line

TIMELINE = "timeline.jsonl"
DIGITS = 4  # of seconds


def log_timeline(run_dir: Path, step: int, measured: Measured, layout: Layout) -> None:
    """Write down what was measured up to the line of this step in `metrics.jsonl`."""
    if measured.names:
        with open(run_dir / TIMELINE, "a") as file:
            write_line(file, record_of(step, measured, layout))


def record_of(step: int, measured: Measured, layout: Layout) -> dict[str, Any]:
    """A line: {"step", "began", "ranks": [{"rank", "role", "events": [[name, begin, end, wait]]}]}.
    began: when the first rank began its first phase [unix seconds], from which all times count.
    """
    began = min(times_E[0][0] for times_E in measured.times_RE)
    of_ranks = zip(measured.times_RE, measured.waits(), strict=True)
    ranks = [
        {
            "rank": rank,
            "role": role_of(rank, layout),
            "events": [
                [
                    name,
                    round(begin - began, DIGITS),
                    round(end - began, DIGITS),
                    round(wait, DIGITS),
                ]
                for name, (begin, end), wait in zip(measured.names, *of_rank, strict=True)
            ],
        }
        for rank, of_rank in enumerate(of_ranks)
    ]
    return {"step": step, "began": round(began, DIGITS), "ranks": ranks}


def role_of(rank: int, layout: Layout) -> str:
    """trainer, generator or both."""
    if rank not in layout.generator_ranks:
        return "trainer"
    return "both" if rank in layout.trainer_ranks else "generator"
