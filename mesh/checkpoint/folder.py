"""The directories in which a run keeps what outlives it: what is in them, and what is set aside.

A directory `step-N` is whole; `step-N.partial` was being written, or removed, when a run ended.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mesh.checkpoint.files import Index, read_index
from mesh.lifecycle.process import Process

T = TypeVar("T")
PARTIAL, DAMAGED = ".partial", ".damaged"


def prepare(path: Path) -> None:
    """Make the directory; what was being written when a run ended is removed."""
    refuse_link(path)
    path.mkdir(exist_ok=True)
    for partial in path.glob(f"step-*{PARTIAL}"):
        remove(partial)


def steps_in(path: Path) -> list[int]:
    """The steps of what was completed, newest first."""
    refuse_link(path)
    found = (re.fullmatch(r"step-(\d+)", item.name) for item in path.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise OSError(0, "is a symbolic link, which is not followed", str(path))


def indexed(path: Path) -> tuple[Index | None, str]:
    """A checkpoint's index, or why it cannot be used."""
    try:
        index = read_index(path)
    except ValueError as error:
        return None, str(error)
    named = path.name == f"step-{index.step}"
    return (index, "") if named else (None, f"it holds step {index.step}")


def set_aside(path: Path) -> None:
    """Rename what is damaged: the run will write that step again."""
    damaged = path.with_name(path.name + DAMAGED)
    if damaged.is_symlink() or damaged.exists():
        remove(damaged)
    path.rename(damaged)


def retire(path: Path) -> None:
    """Remove what was whole; what is left of it, if that is cut short, does not look whole."""
    remove(path.rename(path.with_name(path.name + PARTIAL)))


def remove(path: Path) -> None:
    """A link itself, or a directory with what is in it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def on_rank0(process: Process, path: Path, act: Callable[[], T]) -> T:
    """What rank 0's `act` gives, on every rank; where it fails over a file, every rank raises."""
    value, error = None, None
    if process.rank == 0:
        try:
            value = act()
        except OSError as caught:
            error = f"{caught.filename or path}: {caught.strerror or caught}"
    value, error = process.from_rank0((value, error))
    if error is not None:
        raise RuntimeError(f"checkpoints cannot be kept: {error}")
    return value  # type: ignore[return-value]
