"""Directories of checkpoints and best models: their entries, and the removal of old ones.

`step-N` is complete; `step-N.partial` was being written, or removed, when a run ended.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mesh.checkpoint.files import Index, OtherFormat, read_index
from mesh.config.keys import Refusal
from mesh.lifecycle.process import Process

T = TypeVar("T")
PARTIAL, DAMAGED = ".partial", ".damaged"
OLD = f".old{PARTIAL}"  # complete, until another of the same step has taken its place


def prepare(path: Path) -> None:
    """Create the directory, and remove partial entries of a run that ended, but for one that was
    complete and has not been replaced."""
    refuse_link(path)
    path.mkdir(exist_ok=True)
    for old in path.glob(f"step-*{OLD}"):  # killed between the two renames
        whole = path / old.name.removesuffix(OLD)
        if not old.is_symlink() and not whole.exists():
            old.rename(whole)
    for partial in path.glob(f"step-*{PARTIAL}"):
        remove(partial)


def steps_in(path: Path) -> list[int]:
    """Steps of the complete entries, newest first."""
    refuse_link(path)
    found = (re.fullmatch(r"step-(\d+)", item.name) for item in path.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def refuse_link(path: Path) -> None:
    """Raise OSError for a symbolic link."""
    if path.is_symlink():
        raise OSError(0, "is a symbolic link, which is not followed", str(path))


def checked_index(path: Path) -> tuple[Index | None, str]:
    """(index, "") of a checkpoint, or (None, its damage)."""
    try:
        index = read_index(path)
    except ValueError as error:
        return None, str(error)
    named = path.name == f"step-{index.step}"
    return (index, "") if named else (None, f"it holds step {index.step}")


def mark_damaged(path: Path) -> None:
    """Rename a damaged checkpoint, since the run will write that step again."""
    damaged = path.with_name(path.name + DAMAGED)
    if damaged.is_symlink() or damaged.exists():
        remove(damaged)
    path.rename(damaged)


def discard(path: Path) -> None:
    """Remove a complete entry; renamed first, it does not look complete if that is interrupted."""
    remove(path.rename(path.with_name(path.name + PARTIAL)))


def remove(path: Path) -> None:
    """Remove a directory tree, a file, or a link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def on_rank0(process: Process, path: Path, act: Callable[[], T]) -> T:
    """Run `act` on rank 0 and return its result on every rank; an OSError is raised on all, and a
    checkpoint of another format is refused by all."""
    value: T | None = None
    error: Exception | None = None
    if process.rank == 0:
        try:
            value = act()
        except OtherFormat as caught:
            error = Refusal(str(caught))
        except OSError as caught:
            place = f"{caught.filename or path}: {caught.strerror or caught}"
            error = RuntimeError(f"cannot access checkpoints: {place}")
    value, error = process.from_rank0((value, error))
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
