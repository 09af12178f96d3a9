"""The pass rates of a run's questions in a checkpoint: one file, of what the draws of the next step
depend on. Only runs with bounds on them (`difficulty.*`) have it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from mesh.checkpoint.files import Entry, flush, no_link
from mesh.tasks.difficulty import Known

FILE = "pass_rates.json"


def rates_job(folder: Path, known: Known | None) -> dict[Path, Callable[[Path], Entry]]:
    """The function that writes the file, by its path in `folder`; none where none is kept."""
    return {} if known is None else {folder / FILE: partial(write_rates, known)}


def write_rates(known: Known, path: Path) -> Entry:
    """Write them to a new file, flushed to disk; floats keep their bits."""
    data = (json.dumps(dict(known)) + "\n").encode()
    with open(path, "xb") as file:
        file.write(data)
        flush(file)
    return Entry(len(data), hashlib.sha256(data).hexdigest(), {})


def read_rates(folder: Path, files: Collection[str]) -> Known:
    """The pass rates of a checkpoint with these files; none where it holds none."""
    if FILE not in files:
        return {}
    with open(folder / FILE, opener=no_link) as file:
        return {name: (rate, step) for name, (rate, step) in json.load(file).items()}
