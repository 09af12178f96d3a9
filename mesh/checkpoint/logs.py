"""The history of a run inside its checkpoints: copies of the logs, and how they are put back.

A resumed run takes its logs from the checkpoint alone, so that they end with its step, without gap
or duplicate, whatever became of the files in the run directory since. A copy is made of the bytes
that were there when the checkpoint's step had been logged, by the thread that writes the weights.
What the checkpoint before had copied must still stand in front of them: a log that is damaged while
a run writes it ends the run before the damage gets into a checkpoint.
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
from mesh.lifecycle.heartbeat import beat
from mesh.roles.nonfinite import REPORT

LOGS = ("metrics.jsonl", "samples.jsonl")
KEPT_LOGS = (*LOGS, REPORT)  # the last one is there only where a step was not finite


def copies(
    run_dir: Path, folder: Path, before: Mapping[str, Entry]
) -> dict[Path, Callable[[Path], Entry]]:
    """By the file in `folder`, what copies a log of `run_dir` there as it is now. `before`: what
    the last checkpoint holds of them. Raises OSError where a log is not there."""
    names = [name for name in KEPT_LOGS if name in LOGS or (run_dir / name).exists()]
    sizes = {name: (run_dir / name).stat().st_size for name in names}
    return {
        folder / name: partial(copied, run_dir / name, sizes[name], before.get(name))
        for name in names
    }


def copied(source: Path, length: int, before: Entry | None, target: Path) -> Entry:
    """Copy the first `length` bytes of a log to a new file and to the disk.

    Raises ValueError where they are not there, or do not begin with those of `before`.
    """
    digest, done = hashlib.sha256(), 0
    with open(source, "rb", opener=no_link) as reader, open(target, "xb") as writer:
        if before is not None:
            done = _pass_on(reader, writer, digest, before.bytes)
            if done != before.bytes or digest.hexdigest() != before.sha256:
                wrong = f"the first {before.bytes} bytes of {source} are no longer those logged"
                raise ValueError(f"{wrong}; resuming puts the file back")
        done += _pass_on(reader, writer, digest, length - done)
        if done != length:
            raise ValueError(f"{source} ends after {done} bytes, of {length}")
        flush(writer)
    return Entry(done, digest.hexdigest(), {})


def _pass_on(reader: Any, writer: Any, digest: Any, length: int) -> int:
    """How many of `length` bytes were there."""
    done = 0
    while piece := reader.read(min(READ_BYTES, length - done)):
        writer.write(piece)
        digest.update(piece)
        beat()
        done += len(piece)
    return done


def put_back(checkpoint: Path, files: Mapping[str, Entry], run_dir: Path) -> None:
    """Make the logs in `run_dir` those of a checkpoint, each at once (a rename)."""
    for name in KEPT_LOGS:
        if name not in files:
            (run_dir / name).unlink(missing_ok=True)
            continue
        new = run_dir / (name + PARTIAL)
        new.unlink(missing_ok=True)  # of a start that was killed right here
        copied(checkpoint / name, files[name].bytes, None, new)
        new.replace(run_dir / name)
    sync_path(run_dir)
