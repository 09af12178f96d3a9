"""Lines of a benchmark's report: the machine, rows of a Markdown table, ratios."""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median

import torch

from mesh.runs.directory import cpu_model


def hardware() -> str:
    """The machine in one line, with its load, which affects timings."""
    words = [f"{len(os.sched_getaffinity(0))} cores of {cpu_model()}"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name(0))
    words += [f"torch {torch.__version__}", f"load average {os.getloadavg()[0]:.1f} at start"]
    return ", ".join(words)


def print_row(*cells: str) -> None:
    """A row of a Markdown table, as it goes into LOG.md."""
    print(f"| {' | '.join(cells)} |", flush=True)


def spread(ratios: Sequence[float]) -> str:
    """The median of paired ratios, and the smallest and largest one."""
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
