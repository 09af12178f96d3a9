"""When checkpoints are written, which are kept, and which one a resumed run starts from.

A checkpoint is a copy of the state in host memory, taken between two steps, which a thread of each
rank writes into `checkpoints/step-N.partial` while training goes on. When all ranks have written -
they tell each other after every step - rank 0 writes the index and renames the directory to
`step-N`: what has that name is whole, at whatever moment the power went. A checkpoint holds what
the next step needs and cannot work out: fp32 weights and AdamW's moments. Prompts and random
numbers are functions of (seed, step), the frozen reference is one of the starting weights.

The run directory must be one that all ranks see.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from mesh.checkpoint.files import (
    Entry,
    Index,
    file_problem,
    read_blocks,
    read_index,
    sync_path,
    write_index,
    write_tensors,
)
from mesh.conf import Conf
from mesh.holdings import local_tensors
from mesh.keys import problem
from mesh.process import Process
from mesh.reshard import Block
from mesh.trainer import Trainer
from mesh.weights import weights_digest

T = TypeVar("T")
PARTIAL, DAMAGED = ".partial", ".damaged"
LOGS = ("metrics.jsonl", "samples.jsonl")


class Writing(threading.Thread):
    """One rank's file on its way to the disk. `outcome`: its entry, or what went wrong; None: it is
    not there yet."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], blocks: dict[str, Block]):
        super().__init__(name="mesh-checkpoint", daemon=True)
        self.path, self.tensors, self.blocks = path, tensors, blocks
        self.outcome: Entry | str | None = None

    def run(self) -> None:
        if not self.tensors:  # off the trainer, or replicas of what others write
            self.outcome = Entry(0, "", {})
            return
        try:
            self.outcome = Entry(*write_tensors(self.path, self.tensors), self.blocks)
        except Exception as error:  # the main thread raises it, on all ranks
            self.outcome = f"{self.path}: {error}"


class Checkpointer:
    """Owns RUN_DIR/checkpoints. Every verb is a collective of the world."""

    def __init__(self, conf: Conf, run_dir: Path, process: Process, trainer: Trainer) -> None:
        """Raises RuntimeError where checkpoints are asked for and their directory cannot be."""
        self.conf, self.run_dir, self.process, self.trainer = conf, run_dir, process, trainer
        self.path = run_dir / "checkpoints"
        names = trainer.master_names
        self.layouts = [layout for layout in trainer.layouts if layout.name in names]
        held = {layout.name: layout.blocks.get(process.rank) for layout in self.layouts}
        holders = {layout.name: layout.holders() for layout in self.layouts}
        self.own = {  # of replicas the first one writes
            name: block
            for name, block in held.items()
            if block is not None and holders[name][block][0] == process.rank
        }
        self._writing: tuple[int, int, Writing, dict[str, str]] | None = None
        if conf.checkpoint.every or conf.resume:
            self._on_rank0(lambda: prepare(self.path))

    def load(self) -> int:
        """Fill the trainer from the newest whole checkpoint; returns the number of steps it holds.

        One that is damaged is named, set aside and passed over. Raises ValueError where none is
        left, or where it is of another model or seed; RuntimeError where the digests of what was
        loaded are not those of what was saved.
        """
        for step in self._on_rank0(lambda: steps_in(self.path)):
            path = self.path / f"step-{step}"
            if self._load(path):
                self._on_rank0(self._remove_old)  # a run can die before it has
                return step
            self._on_rank0(lambda path=path: set_aside(path))  # type: ignore[misc]
        wrong_here = f"no whole checkpoint is in {self.path}"
        raise ValueError(problem("resume", self.run_dir, wrong_here, "start a new run"))

    def load_before(self, limit: int) -> int:
        """As `load`, from the newest one with fewer than `limit` steps, and changing nothing on the
        disk. Returns 0, with the trainer as it was, where there is none."""
        held = self._on_rank0(lambda: steps_in(self.path) if self.path.exists() else [])
        steps = (step for step in held if step < limit)
        return next((step for step in steps if self._load(self.path / f"step-{step}")), 0)

    def after(self, step: int, stop: bool) -> None:
        """To be called after every step: `step` are finished, `stop`: it was the last one.

        Writes a checkpoint every `checkpoint.every` steps and after the last one, and where a run
        is stopped before its end even if no other is asked for. Raises RuntimeError on all ranks
        where one could not be written; those before it stay as they are.
        """
        every, last = self.conf.checkpoint.every, self.conf.steps
        ending = stop or step == last
        if not every and not (stop and step < last):
            return
        due = ending or step % every == 0
        self._finish(wait=due)
        if due:
            self._begin(step)
        if ending:
            self._finish(wait=True)
            if step < self.conf.steps:
                self.process.say(f"to continue after step {step}: resume={self.run_dir}")

    def digests(self) -> dict[str, str]:
        """A number for each kind of the trainer's state, the same on any mesh; that of the weights
        is the metric `digest/weights`, to which a tied weight counts under both names."""
        trainer, group = self.trainer, self.process.cpu_group
        both = [layout for layout in trainer.layouts if layout.name in trainer.weight_names]
        state = trainer.state()
        weights = {"weights": weights_digest(trainer.parameters(), both, group)}
        moments = state.keys() - weights
        return weights | {k: weights_digest(state[k], self.layouts, group) for k in sorted(moments)}

    def _begin(self, step: int) -> None:
        self._on_rank0(lambda: prepare(self.path))  # not there if it was not asked for before
        partial = self.path / f"step-{step}{PARTIAL}"
        digests = self.digests()
        self._on_rank0(lambda: partial.mkdir())
        with torch.no_grad():
            tensors = {
                f"{kind}/{name}": local.to("cpu", copy=True).contiguous()
                for kind, whole in self.trainer.state().items()
                for name, local in local_tensors(whole).items()
                if name in self.own
            }
        writing = Writing(partial / f"rank-{self.process.rank}.safetensors", tensors, self.own)
        writing.start()
        self._writing = step, self.trainer.updates, writing, digests

    def _finish(self, wait: bool) -> None:
        """Make the checkpoint that is being written complete, if all ranks have written theirs."""
        if self._writing is None:
            return
        step, updates, writing, digests = self._writing
        if wait:
            writing.join()
        outcomes = self.process.gather(writing.outcome)
        if any(outcome is None for outcome in outcomes):
            return
        self._writing = None
        wrong = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if wrong:
            self._give_up(step, wrong)
        files = {
            f"rank-{rank}.safetensors": entry for rank, entry in enumerate(outcomes) if entry.blocks
        }
        shapes = {layout.name: layout.shape for layout in self.layouts}
        index = Index(step, updates, self.conf.seed, digests, shapes, files)
        self._on_rank0(lambda: self._complete(index))

    def _complete(self, index: Index) -> None:
        partial = self.path / f"step-{index.step}{PARTIAL}"
        # a resumed run reads its keys, and cuts its logs after this step, so they must reach it
        for path in (*(self.run_dir / name for name in ("config.yaml", *LOGS)), self.run_dir):
            if path.exists():
                sync_path(path)
        write_index(partial, index)
        partial.rename(self.path / f"step-{index.step}")
        sync_path(self.path)
        self._remove_old()

    def _remove_old(self) -> None:
        for step in steps_in(self.path)[self.conf.checkpoint.keep :]:
            old = self.path / f"step-{step}"
            remove(old.rename(old.with_name(old.name + PARTIAL)))

    def _give_up(self, step: int, wrong: list[str]) -> None:
        if self.process.rank == 0:
            with contextlib.suppress(OSError):  # what is told is what went wrong before
                remove(self.path / f"step-{step}{PARTIAL}")
        raise RuntimeError(
            f"the checkpoint of step {step} could not be written: {'; '.join(wrong)}; "
            f"mend that, then resume={self.run_dir} continues from the one before"
        )

    def _inspect(self, path: Path) -> tuple[Index | None, list[str]]:
        """A checkpoint's index, or what is wrong; the ranks share the reading of its files."""
        index, wrong = self._on_rank0(lambda: indexed(path))
        if index is None:
            return None, [wrong]
        names = sorted(index.files)[self.process.rank :: self.process.world_size]
        found = [file_problem(path / name, index.files[name]) for name in names]
        problems = [line for part in self.process.gather(found) for line in part if line]
        return (None, problems) if problems else (index, [])

    def _load(self, path: Path) -> bool:
        """Fill the trainer from a checkpoint; False, and a line that says why, if it is damaged."""
        index, wrong = self._inspect(path)
        if index is None:
            self.process.say(f"{path} is passed over: {'; '.join(wrong)}")
            return False
        self._take(path, index)
        return True

    def _take(self, path: Path, index: Index) -> None:
        if index.seed != self.conf.seed:
            wrong = f"{path} is of a run with seed {index.seed}"
            raise ValueError(problem("seed", self.conf.seed, wrong, f"use {index.seed}"))
        with torch.no_grad():
            state = {kind: local_tensors(part) for kind, part in self.trainer.state().items()}
        read_blocks(path, index, state, self.layouts, self.process.rank)
        self.trainer.continue_after(index.step, index.updates)
        digests = self.digests()
        if digests != index.digests:
            raise RuntimeError(f"{path} was saved as {index.digests} and loaded as {digests}")
        self.process.say(f"resumed from {path}: weights and moments are those that were saved")

    def _on_rank0(self, act: Callable[[], T]) -> T:
        """What rank 0's `act` gives, on every rank; where it fails, every rank raises."""
        value, error = None, None
        if self.process.rank == 0:
            try:
                value = act()
            except OSError as caught:
                error = f"{caught.filename or self.path}: {caught.strerror or caught}"
        value, error = self.process.from_rank0((value, error))
        if error is not None:
            raise RuntimeError(f"checkpoints cannot be kept: {error}")
        return value  # type: ignore[return-value]


def prepare(path: Path) -> None:
    """Make the directory of checkpoints; what was being written when a run ended is removed."""
    refuse_link(path)
    path.mkdir(exist_ok=True)
    for partial in path.glob(f"step-*{PARTIAL}"):
        remove(partial)


def steps_in(path: Path) -> list[int]:
    """The steps of the checkpoints that were completed, newest first."""
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


def remove(path: Path) -> None:
    """A link itself, or a directory with what is in it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)
