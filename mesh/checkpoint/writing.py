"""The thread by which each rank writes its files of a checkpoint while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mesh.checkpoint.files import Entry, Index, write_tensors
from mesh.layout.reshard import Block


class Writing(threading.Thread):
    """One rank's files on their way to the disk. `jobs`: what writes each of them. `outcome`: their
    entries by name, or what went wrong; None: they are not there yet."""

    def __init__(self, jobs: Mapping[Path, Callable[[Path], Entry]]):
        super().__init__(name="mesh-checkpoint", daemon=True)
        self.jobs = jobs
        self.outcome: dict[str, Entry] | str | None = None

    def run(self) -> None:
        written = {}
        for path, write in self.jobs.items():
            try:
                written[path.name] = write(path)
            except Exception as error:  # the main thread raises it, on all ranks
                self.outcome = f"{path}: {error}"
                return
        self.outcome = written


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written: its index, but for the files, and this rank's thread."""

    index: Index
    writing: Writing


def write_blocks(
    tensors: Mapping[str, torch.Tensor], blocks: Mapping[str, Block], path: Path
) -> Entry:
    """Write one rank's blocks."""
    return Entry(*write_tensors(path, tensors), dict(blocks))
