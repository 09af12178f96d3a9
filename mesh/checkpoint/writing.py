"""Background thread that writes one rank's checkpoint files while training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mesh.checkpoint.files import Entry, Index, write_tensors
from mesh.layout.reshard import Block


class CheckpointWriter(threading.Thread):
    """Writes one rank's files of a checkpoint. `jobs`: the function that writes each path.
    `outcome`: their entries by file name, or the error; None while it runs."""

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
    """A checkpoint being written: its index, still without files, and this rank's writer."""

    index: Index
    writer: CheckpointWriter


def write_blocks(
    tensors: Mapping[str, torch.Tensor], blocks: Mapping[str, Block], path: Path
) -> Entry:
    """Write one rank's blocks."""
    return Entry(*write_tensors(path, tensors), dict(blocks))
