"""What a step that was trained, but neither evaluated nor logged, leaves in its checkpoint: its
record. A resumed run evaluates and logs it before it trains on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mesh.checkpoint.files import Entry, flush, no_link
from mesh.rl.samples import StepRecord

PREFIX = "unlogged-"


def file_name(rank: int) -> str:
    return f"{PREFIX}{rank}.json"


def write_unlogged(step: StepRecord, path: Path) -> Entry:
    """Write this rank's record to a new file, flushed to disk; floats keep their bits, NaN and
    infinities too."""
    data = (json.dumps(asdict(step), default=lambda number: number.item()) + "\n").encode()
    with open(path, "xb") as file:
        file.write(data)
        flush(file)
    return Entry(len(data), hashlib.sha256(data).hexdigest(), {})


def read_unlogged(folder: Path, files: Iterable[str]) -> StepRecord | None:
    """All ranks' samples, in order, and the rest of the first rank's record; None if the
    checkpoint's step was logged."""
    names = [name for name in files if name.startswith(PREFIX)]
    if not names:
        return None
    parts = {name: json.loads(_read(folder / name)) for name in names}
    samples = [sample for part in parts.values() for sample in part["samples"]]
    samples.sort(key=lambda sample: (sample["prompt_id"], sample["sample_id"]))
    first = parts[file_name(0)]
    return StepRecord(first["metrics"], samples, first.get("histograms", {}))


def _read(path: Path) -> str:
    with open(path, opener=no_link) as file:
        return file.read()
