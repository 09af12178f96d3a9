"""The copy of a run's logs beside its checkpoints, and how they are restored from it.

A resumed run takes its logs from the copy, so that they end with the checkpoint's step, without gap
or duplicate, whatever happened to the files in the run directory since. Logs only grow, so all
checkpoints share one copy: each adds what is new, and its index has the length and the digest of
the beginning that is its own. A log that is damaged while the run writes it stops the run before
the damage enters the copy; where the copy is damaged, the run's own file serves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mesh.checkpoint.files import READ_BYTES, Entry, file_problem, flush, no_link
from mesh.checkpoint.folder import PARTIAL, refuse_link
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.heartbeat import heartbeat
from mesh.roles.nonfinite import REPORT
from mesh.runs.samples import OLD_SAMPLES, SAMPLES, Mark
from mesh.runs.timeline import TIMELINE

LOGS = ("metrics.jsonl", SAMPLES)
KEPT_LOGS = (*LOGS, OLD_SAMPLES, REPORT, TIMELINE)
"""A run need not have the last three: samples of before they were compressed, a report if a step
was not finite, and a timeline."""

COPY = Path("checkpoints", "logs")
"""The folder of the copy in a run directory."""

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
    run_dir: Path, before: Mapping[str, Entry], sizes: Mapping[str, int]
) -> dict[Path, Callable[[Path], Entry]]:
    """Functions that extend the copy of the logs of `run_dir` to these lengths, by file. `before`:
    their entries in the previous checkpoint. Raises OSError if one is missing."""
    for name in LOGS:
        (run_dir / name).stat()
    return {
        run_dir / COPY / name: partial(copy_log, run_dir / name, size, before.get(name))
        for name, size in sizes.items()
    }


def copy_log(source: Path, length: int, before: Entry | None, target: Path) -> Entry:
    """Have `target` be the first `length` bytes of a log, flushed to disk, and keep the bytes of
    `before` that it has already.

    Raises ValueError if the log is shorter, or does not begin with the bytes of `before`.
    """
    refuse_link(target.parent)
    target.parent.mkdir(exist_ok=True)
    digest, kept = hashlib.sha256(), 0
    with open(source, "rb", opener=no_link) as reader, open(target, "r+b", opener=made) as writer:
        if before is not None:
            kept = _pass_bytes(reader, None, digest, before.bytes)
            if kept != before.bytes or digest.hexdigest() != before.sha256:
                wrong = f"the first {before.bytes} bytes of {source} have changed since logged"
                raise ValueError(f"{wrong}; resuming restores the file")
        if os.fstat(writer.fileno()).st_size < kept:  # there is no copy, or not all of it
            digest, kept = hashlib.sha256(), 0
        reader.seek(kept)
        writer.truncate(kept)
        writer.seek(kept)
        done = kept + _pass_bytes(reader, writer, digest, length - kept)
        if done != length:
            raise ValueError(f"{source} has {done} bytes instead of {length}")
        flush(writer)
    sync_path(target.parent)
    return Entry(done, digest.hexdigest(), {})


def made(path: str, flags: int) -> int:
    """Opener that makes a file which is not there, and refuses symbolic links."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _pass_bytes(reader: Any, writer: Any, digest: Any, length: int) -> int:
    """Read up to `length` bytes, and write them if there is a writer; returns their number."""
    done = 0
    while piece := reader.read(min(READ_BYTES, length - done)):
        if writer is not None:
            writer.write(piece)
        digest.update(piece)
        heartbeat()
        done += len(piece)
    return done


def stored_problem(checkpoint: Path, name: str, entry: Entry, run_dir: Path) -> str | None:
    """Damage of a file that a checkpoint's index names; None: it is intact."""
    if name not in KEPT_LOGS:
        return file_problem(checkpoint / name, entry)
    problems = [problem for _, problem in log_copies(checkpoint, name, entry, run_dir)]
    return None if None in problems else problems[0]


def log_copies(
    checkpoint: Path, name: str, entry: Entry, run_dir: Path
) -> Iterator[tuple[Path, str | None]]:
    """Where a log of a checkpoint may be read, and what is wrong with it there: in the copy, in the
    run directory, and, of format 4, in the checkpoint itself."""
    refuse_link(run_dir / COPY)
    for path in (run_dir / COPY / name, run_dir / name, checkpoint / name):
        yield path, file_problem(path, entry, whole=False)


def restore_logs(checkpoint: Path, files: Mapping[str, Entry], run_dir: Path) -> None:
    """Replace the logs in `run_dir` by a checkpoint's, each atomically (a rename). A damaged copy
    goes: the next checkpoint makes it anew."""
    for name in KEPT_LOGS:
        if name not in files:
            (run_dir / name).unlink(missing_ok=True)
            continue
        copies = log_copies(checkpoint, name, files[name], run_dir)
        source = next(path for path, problem in copies if problem is None)
        new = run_dir / (name + PARTIAL)
        new.unlink(missing_ok=True)  # left by a start that was killed here
        copy_log(source, files[name].bytes, None, new)
        new.replace(run_dir / name)
        if source != run_dir / COPY / name:
            (run_dir / COPY / name).unlink(missing_ok=True)
    sync_path(run_dir)
