"""What a step that was trained, but neither evaluated nor logged, leaves in its checkpoint: its
metrics so far and its samples. A resumed run evaluates and logs it before it trains on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.checkpoint.files import Entry, flush, no_link

PREFIX = "unlogged-"


@dataclass(frozen=True)
class Unlogged:
    """One rank's metrics and samples of a step."""

    metrics: Mapping[str, Any]
    samples: list[dict[str, Any]]


def file_name(rank: int) -> str:
    return f"{PREFIX}{rank}.json"


def write_unlogged(step: Unlogged, path: Path) -> Entry:
    """Write them to a new file, flushed to disk; floats keep their bits, NaN and infinities too."""
    content = {"metrics": dict(step.metrics), "samples": step.samples}
    data = (json.dumps(content, default=lambda number: number.item()) + "\n").encode()
    with open(path, "xb") as file:
        file.write(data)
        flush(file)
    return Entry(len(data), hashlib.sha256(data).hexdigest(), {})


def read_unlogged(folder: Path, files: Iterable[str]) -> Unlogged | None:
    """All ranks' samples, in order, and the first rank's metrics; None if the checkpoint's step was
    logged."""
    names = [name for name in files if name.startswith(PREFIX)]
    if not names:
        return None
    parts = {name: json.loads(_read(folder / name)) for name in names}
    samples = [sample for part in parts.values() for sample in part["samples"]]
    samples.sort(key=lambda sample: (sample["prompt_id"], sample["sample_id"]))
    return Unlogged(parts[file_name(0)]["metrics"], samples)


def _read(path: Path) -> str:
    with open(path, opener=no_link) as file:
        return file.read()
