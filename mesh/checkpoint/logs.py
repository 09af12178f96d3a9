"""Copies of a run's logs inside its checkpoints, and how they are restored.

A resumed run takes its logs from the checkpoint alone, so that they end with its step, without gap
or duplicate, whatever happened to the files in the run directory since. A copy holds the bytes
written when the checkpoint's step had been logged; the thread that writes the weights makes it. It
must begin with the previous checkpoint's copy: a log that is damaged while the run writes it stops
the run before the damage enters a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mesh.checkpoint.files import READ_BYTES, Entry, flush, no_link
from mesh.checkpoint.folder import PARTIAL
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.heartbeat import heartbeat
from mesh.roles.nonfinite import REPORT
from mesh.runs.samples import OLD_SAMPLES, SAMPLES, Mark
from mesh.runs.timeline import TIMELINE

LOGS = ("metrics.jsonl", SAMPLES)
KEPT_LOGS = (*LOGS, OLD_SAMPLES, REPORT, TIMELINE)
"""A run need not have the last three: samples of before they were compressed, a report if a step
was not finite, and a timeline."""

Sizes = Callable[[float | None], dict[str, int]]
"""Lengths of the logs at a moment; waits so many seconds for those that a thread writes."""


def log_sizes(run_dir: Path, samples: Mark | None = None) -> Sizes:
    """Lengths of the logs as they are now; 0 for a missing one. samples: the place in that log up
    to which it counts, which may not be written yet."""
    found = {name: run_dir / name for name in KEPT_LOGS}
    now = {name: path.stat().st_size for name, path in found.items() if path.exists()}
    sizes = dict.fromkeys(LOGS, 0) | now
    return lambda seconds: sizes | ({SAMPLES: samples.size(seconds)} if samples else {})


def copy_jobs(
    run_dir: Path, folder: Path, before: Mapping[str, Entry], sizes: Mapping[str, int]
) -> dict[Path, Callable[[Path], Entry]]:
    """Functions that copy the logs of `run_dir` in these lengths, by target file in `folder`.
    `before`: their entries in the previous checkpoint. Raises OSError if one is missing."""
    for name in LOGS:
        (run_dir / name).stat()
    return {
        folder / name: partial(copy_log, run_dir / name, size, before.get(name))
        for name, size in sizes.items()
    }


def copy_log(source: Path, length: int, before: Entry | None, target: Path) -> Entry:
    """Copy the first `length` bytes of a log to a new file, flushed to disk.

    Raises ValueError if the log is shorter, or does not begin with the bytes of `before`.
    """
    digest, done = hashlib.sha256(), 0
    with open(source, "rb", opener=no_link) as reader, open(target, "xb") as writer:
        if before is not None:
            done = _copy_bytes(reader, writer, digest, before.bytes)
            if done != before.bytes or digest.hexdigest() != before.sha256:
                wrong = f"the first {before.bytes} bytes of {source} have changed since logged"
                raise ValueError(f"{wrong}; resuming restores the file")
        done += _copy_bytes(reader, writer, digest, length - done)
        if done != length:
            raise ValueError(f"{source} has {done} bytes instead of {length}")
        flush(writer)
    return Entry(done, digest.hexdigest(), {})


def _copy_bytes(reader: Any, writer: Any, digest: Any, length: int) -> int:
    """Copy up to `length` bytes; returns their number."""
    done = 0
    while piece := reader.read(min(READ_BYTES, length - done)):
        writer.write(piece)
        digest.update(piece)
        heartbeat()
        done += len(piece)
    return done


def restore_logs(checkpoint: Path, files: Mapping[str, Entry], run_dir: Path) -> None:
    """Replace the logs in `run_dir` by a checkpoint's, each atomically (a rename)."""
    for name in KEPT_LOGS:
        if name not in files:
            (run_dir / name).unlink(missing_ok=True)
            continue
        new = run_dir / (name + PARTIAL)
        new.unlink(missing_ok=True)  # left by a start that was killed here
        copy_log(checkpoint / name, files[name].bytes, None, new)
        new.replace(run_dir / name)
    sync_path(run_dir)
