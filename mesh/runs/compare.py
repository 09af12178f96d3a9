"""Whether two runs are the same run: their logs field by field, their models byte by byte.

How long things took, and how full a GPU was, is left out. Values are equal where their JSON is,
which has every bit of a float: -0.0 is not 0.0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
OF_THE_MACHINE = ("seconds/", "tokens_per_second/", "gpu_gb/")
NOTHING = "nothing"  # what stands for a field, a line or a file that one side lacks
NAMES = ("step", "prompt_id", "sample_id")


@dataclass(frozen=True)
class Difference:
    """A field that differs: the file it is in, the line's names (step, ...), both values."""

    file: str
    line: str
    key: str
    a: Any
    b: Any

    def __str__(self) -> str:
        place = " ".join(filter(None, [self.file, self.line]))
        return f"{place}: {self.key} differs: {_shown(self.a)} and {_shown(self.b)}"


@dataclass(frozen=True)
class Compared:
    """Two run directories: how much of the first was compared, and the first difference."""

    steps: int
    samples: int
    files: int
    first: Difference | None


def untimed(line: Line) -> dict[str, Any]:
    """A step's metrics without what they say of the machine: its time and memory."""
    return {key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)}


def different(a: Line, b: Line) -> list[str]:
    """The fields that two lines do not share with equal values, in order; timings count."""
    keys = [*a, *(key for key in b if key not in a)]
    return [k for k in keys if k not in a or k not in b or not equal(a[k], b[k])]


def equal(a: Any, b: Any) -> bool:
    """Whether two values of JSON are the same to the bit."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def line_differences(file: str, a: Sequence[Line], b: Sequence[Line]) -> Iterator[Difference]:
    """What differs between two lists of lines, in order; timings are left out."""
    for mine, theirs in zip_longest(a, b):
        if mine is None or theirs is None:
            sides = (_names(side) if side is not None else NOTHING for side in (mine, theirs))
            yield Difference(file, "", "line", *sides)
            continue
        mine, theirs = untimed(mine), untimed(theirs)
        for key in different(mine, theirs):
            values = mine.get(key, NOTHING), theirs.get(key, NOTHING)
            yield Difference(file, _names(mine), key, *values)


def compare_runs(a: Path, b: Path) -> Compared:
    """Compare metrics, samples, final models and, where both runs keep one, the best models.
    Raises ValueError where a log cannot be read."""
    metrics = [read_lines(run / "metrics.jsonl") for run in (a, b)]
    samples = [read_lines(run / "samples.jsonl") for run in (a, b)]
    models = [file_digests(run / "model", "model/") for run in (a, b)]
    best = [path for path in map(best_model, (a, b)) if path is not None]
    if len(best) == 2:
        models = [m | file_digests(p, f"best/{p.name}/") for m, p in zip(models, best, strict=True)]
    found = [
        *line_differences("metrics.jsonl", *metrics),
        *line_differences("samples.jsonl", *samples),
        *(
            Difference(name, "", "SHA-256", *(side.get(name, NOTHING) for side in models))
            for name in sorted(models[0] | models[1])
            if models[0].get(name) != models[1].get(name)
        ),
    ]
    first = found[0] if found else None
    return Compared(len(metrics[0]), len(samples[0]), len(models[0]), first)


def read_lines(path: Path, killed: bool = False) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises ValueError that names the file and the line.

    `killed`: a last line that was cut short is left out.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name the directory of a run") from error
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if killed and not line.endswith(b"\n"):
            return found
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not line.endswith(b"\n"):
            remedy = "a run that was killed leaves one, resume= cuts it off"
            raise ValueError(f"{path}: line {number} is no whole line of JSON; {remedy}")
        found.append(record)
    return found


def best_model(run_dir: Path) -> Path | None:
    """The directory of a run's best model, the last one of those it keeps; None: it keeps none."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in (run_dir / "best").glob("step-*"))
    steps = [int(match[1]) for match in names if match]
    return run_dir / "best" / f"step-{max(steps)}" if steps else None


def file_digests(path: Path, prefix: str = "") -> dict[str, str]:
    """SHA-256 by name of the files in a directory; none where it is not there."""
    files = sorted(path.iterdir()) if path.is_dir() else []
    return {prefix + file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _names(line: Line) -> str:
    return " ".join(f"{name} {line[name]}" for name in NAMES if name in line)


def _shown(value: Any) -> str:
    return NOTHING if value == NOTHING else json.dumps(value, ensure_ascii=False)
