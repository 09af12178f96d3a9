"""Comparison of two runs: their logs field by field, their models byte by byte.

Timings and GPU memory are left out. Values are equal if their JSON is, which has every bit of a
float: -0.0 is not 0.0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mesh.runs.lines import Line, read_lines
from mesh.runs.samples import SAMPLES, read_samples

MACHINE_METRICS = ("seconds/", "tokens_per_second/", "gpu_gb/", "host_gb", "mfu/", "sync/")
NOTHING = "nothing"  # stands for a field, a line or a file that one side lacks
NAMES = ("step", "set", "prompt_id", "sample_id")


@dataclass(frozen=True)
class FieldDifference:
    """A field that differs: its file, its line's names (step, ...), its key and both values."""

    file: str
    line: str
    key: str
    a: Any
    b: Any

    def __str__(self) -> str:
        place = " ".join(filter(None, [self.file, self.line]))
        return f"{place}: {self.key} differs: {_shown(self.a)} and {_shown(self.b)}"


@dataclass(frozen=True)
class RunComparison:
    """Counts of what was compared of the first run, and the first difference."""

    steps: int
    samples: int
    files: int
    first: FieldDifference | None


def untimed(line: Line) -> dict[str, Any]:
    """A step's metrics without those of the machine: timings and memory."""
    return {key: value for key, value in line.items() if not key.startswith(MACHINE_METRICS)}


def different(a: Line, b: Line) -> list[str]:
    """Fields that two lines do not share with equal values, in order, timings included."""
    keys = [*a, *(key for key in b if key not in a)]
    return [k for k in keys if k not in a or k not in b or not equal(a[k], b[k])]


def equal(a: Any, b: Any) -> bool:
    """True if two JSON values are bitwise equal."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def line_differences(file: str, a: Sequence[Line], b: Sequence[Line]) -> Iterator[FieldDifference]:
    """Differences between two lists of lines, in order; timings are left out."""
    for mine, theirs in zip_longest(a, b):
        if mine is None or theirs is None:
            sides = (_names(side) if side is not None else NOTHING for side in (mine, theirs))
            yield FieldDifference(file, "", "line", *sides)
            continue
        mine, theirs = untimed(mine), untimed(theirs)
        for key in different(mine, theirs):
            values = mine.get(key, NOTHING), theirs.get(key, NOTHING)
            yield FieldDifference(file, _names(mine), key, *values)


def compare_runs(a: Path, b: Path) -> RunComparison:
    """Compare metrics, samples, final models and, if both runs keep one, the best models.
    Raises ValueError if a log cannot be read."""
    metrics = [read_lines(run / "metrics.jsonl") for run in (a, b)]
    samples = [read_samples(run) for run in (a, b)]
    models = [file_digests(run / "model", "model/") for run in (a, b)]
    best = [path for path in map(best_model, (a, b)) if path is not None]
    if len(best) == 2:
        models = [m | file_digests(p, f"best/{p.name}/") for m, p in zip(models, best, strict=True)]
    found = [
        *line_differences("metrics.jsonl", *metrics),
        *line_differences(SAMPLES, *samples),
        *(
            FieldDifference(name, "", "SHA-256", *(side.get(name, NOTHING) for side in models))
            for name in sorted(models[0] | models[1])
            if models[0].get(name) != models[1].get(name)
        ),
    ]
    first = found[0] if found else None
    return RunComparison(len(metrics[0]), len(samples[0]), len(models[0]), first)


def best_model(run_dir: Path) -> Path | None:
    """Directory of a run's best model, the newest of those kept; None: it keeps none."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in (run_dir / "best").glob("step-*"))
    steps = [int(match[1]) for match in names if match]
    return run_dir / "best" / f"step-{max(steps)}" if steps else None


def file_digests(path: Path, prefix: str = "") -> dict[str, str]:
    """SHA-256 of the files in a directory, by name; empty if it does not exist."""
    files = sorted(path.iterdir()) if path.is_dir() else []
    return {prefix + file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _names(line: Line) -> str:
    return " ".join(f"{name} {line[name]}" for name in NAMES if line.get(name, "") != "")


def _shown(value: Any) -> str:
    return NOTHING if value == NOTHING else json.dumps(value, ensure_ascii=False)
