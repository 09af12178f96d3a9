"""When checkpoints are written, which are kept, and which one a resumed run starts from.

A checkpoint is a copy of the state in host memory, taken between two steps, which a thread of each
rank writes into `checkpoints/step-N.partial` while training goes on. When all ranks have written -
they tell each other after every step - rank 0 writes the index and renames the directory to
`step-N`: what has that name is whole, at whatever moment the power went. A checkpoint holds what
the next step needs and cannot work out: fp32 weights and AdamW's moments. Prompts and random
numbers are functions of (seed, step); of the frozen reference, which is read again from where the
run began, it has the digest. And it holds what the run has said so far: its logs (`logs.py`), and
which evaluation was the best (`best.py`).

The run directory must be one that all ranks see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mesh.checkpoint.best import BestModel, Save, named_in
from mesh.checkpoint.files import (
    Entry,
    Index,
    file_problem,
    read_blocks,
    write_index,
)
from mesh.checkpoint.folder import (
    PARTIAL,
    indexed,
    on_rank0,
    prepare,
    remove,
    retire,
    set_aside,
    steps_in,
)
from mesh.checkpoint.logs import KEPT_LOGS, copies, put_back
from mesh.checkpoint.writing import Pending, Writing, write_blocks
from mesh.config.keys import Refusal, problem
from mesh.config.schema import Conf
from mesh.layout.holdings import local_tensors
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.process import Process
from mesh.roles.trainer import Trainer
from mesh.weights.bridge import weights_digest

T = TypeVar("T")


class Checkpointer:
    """Owns RUN_DIR/checkpoints. Every verb is a collective of the world."""

    def __init__(self, conf: Conf, run_dir: Path, process: Process, trainer: Trainer) -> None:
        """To be made before the first step. Raises RuntimeError where checkpoints are asked for and
        their directory cannot be."""
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
        self.reference = self._reference_digest()
        self._pending: Pending | None = None
        self._logs: dict[str, Entry] = {}  # what the checkpoint before has of them
        if conf.checkpoint.every or conf.resume:
            self._on_rank0(lambda: prepare(self.path))
        self.best = BestModel(conf, run_dir, process, trainer.shape)

    def load(self) -> int:
        """Fill the trainer from the newest whole checkpoint, and make the logs and the best model
        those of its step; returns the number of steps it holds.

        One that is damaged is named, set aside and passed over. Raises ValueError where none is
        left, or where it is of another model, reference or seed; RuntimeError where the digests of
        what was loaded are not those of what was saved.
        """
        for step in self._on_rank0(lambda: steps_in(self.path)):
            path = self.path / f"step-{step}"
            if index := self._load(path):
                self._go_back_to(path, index)
                return step
            self._on_rank0(lambda path=path: set_aside(path))  # type: ignore[misc]
        wrong_here = f"no whole checkpoint is in {self.path}"
        raise Refusal(problem("resume", self.run_dir, wrong_here, "start a new run"))

    def load_before(self, limit: int) -> int:
        """As `load`, from the newest one with fewer than `limit` steps, and changing nothing on the
        disk. Returns 0, with the trainer as it was, where there is none."""
        held = self._on_rank0(lambda: steps_in(self.path) if self.path.exists() else [])
        steps = (step for step in held if step < limit)
        return next((step for step in steps if self._load(self.path / f"step-{step}")), 0)

    def consider(self, step: int, metrics: Mapping[str, Any], save: Save) -> None:
        """To be called when a step is logged and before `after`: where its metrics hold the best
        evaluation so far, `save(path)` writes the model as it is now, and no rank goes on before.
        """
        if self.best.is_beaten(metrics):
            self.best.keep(step, metrics, save)
            self._on_rank0(self._remove_bests)

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
            self.best.say()
            if step < self.conf.steps:
                self.process.say(f"to continue after step {step}: resume={self.run_dir}")

    def digests(self) -> dict[str, str]:
        """A number for each kind of the trainer's state and for the reference, the same on any
        mesh; that of the weights is the metric `digest/weights`, to which a tied weight counts
        under both names."""
        trainer, group = self.trainer, self.process.cpu_group
        both = [layout for layout in trainer.layouts if layout.name in trainer.weight_names]
        state = trainer.state()
        weights = {"weights": weights_digest(trainer.parameters(), both, group)}
        moments = state.keys() - weights
        kinds = {k: weights_digest(state[k], self.layouts, group) for k in sorted(moments)}
        return weights | kinds | self.reference

    def _reference_digest(self) -> dict[str, str]:
        """Of the frozen reference's weights, as long as they are sharded: FSDP leaves some gathered
        after a forward pass. Nothing where the loss has no KL."""
        if not self.conf.kl_coef:
            return {}
        weights, group = self.trainer.reference_weights(), self.process.cpu_group
        return {"reference": weights_digest(weights, self.layouts, group)}

    def _begin(self, step: int) -> None:
        self._on_rank0(lambda: prepare(self.path))  # not there if it was not asked for before
        folder = self.path / f"step-{step}{PARTIAL}"
        shapes = {layout.name: layout.shape for layout in self.layouts}
        index = Index(
            step, self.trainer.updates, self.conf.seed, self.digests(), shapes, {}, self.best.now
        )
        self._on_rank0(lambda: folder.mkdir())
        with torch.no_grad():
            tensors = {
                f"{kind}/{name}": local.to("cpu", copy=True).contiguous()
                for kind, whole in self.trainer.state().items()
                for name, local in local_tensors(whole).items()
                if name in self.own
            }
        jobs: dict[Path, Callable[[Path], Entry]] = {}
        self._on_rank0(lambda: jobs.update(copies(self.run_dir, folder, self._logs)))
        if tensors:  # else off the trainer, or replicas of what others write
            file = folder / f"rank-{self.process.rank}.safetensors"
            jobs[file] = partial(write_blocks, tensors, self.own)
        self._pending = Pending(index, Writing(jobs))
        self._pending.writing.start()

    def _finish(self, wait: bool) -> None:
        """Make the checkpoint that is being written complete, if all ranks have written theirs."""
        if self._pending is None:
            return
        index, writing = self._pending.index, self._pending.writing
        if wait:
            writing.join()
        outcomes = self.process.gather(writing.outcome)
        if any(outcome is None for outcome in outcomes):
            return
        self._pending = None
        wrong = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if wrong:
            self._give_up(index.step, wrong)
        index = replace(index, files={n: entry for part in outcomes for n, entry in part.items()})
        self._on_rank0(lambda: self._complete(index))
        self._note_logs(index)

    def _complete(self, index: Index) -> None:
        folder = self.path / f"step-{index.step}{PARTIAL}"
        for path in (self.run_dir / "config.yaml", self.run_dir):  # a resumed run reads its keys
            if path.exists():
                sync_path(path)
        write_index(folder, index)
        folder.rename(self.path / f"step-{index.step}")
        sync_path(self.path)
        self._remove_old()

    def _note_logs(self, index: Index) -> None:
        self._logs = {name: index.files[name] for name in KEPT_LOGS if name in index.files}

    def _remove_old(self) -> None:
        for step in steps_in(self.path)[self.conf.checkpoint.keep :]:
            retire(self.path / f"step-{step}")
        self._remove_bests()

    def _remove_bests(self) -> None:
        pending = self._pending and self._pending.index.best
        self.best.prune(named_in(self.path) | ({pending.step} if pending else set()))

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

    def _load(self, path: Path) -> Index | None:
        """Fill the trainer from a checkpoint; None, and a line that says why, if it is damaged."""
        index, wrong = self._inspect(path)
        if index is None:
            self.process.say(f"{path} is passed over: {'; '.join(wrong)}")
            return None
        self._take(path, index)
        return index

    def _go_back_to(self, path: Path, index: Index) -> None:
        self._on_rank0(lambda: put_back(path, index.files, self.run_dir))
        self._note_logs(index)
        self.best.take(index.best)
        self._on_rank0(self._remove_old)  # a run can die before it has

    def _take(self, path: Path, index: Index) -> None:
        if index.seed != self.conf.seed:
            wrong = f"{path} is of a run with seed {index.seed}"
            raise Refusal(problem("seed", self.conf.seed, wrong, f"use {index.seed}"))
        if index.digests.get("reference") != self.reference.get("reference"):
            wrong = f"has other weights than {path} began with, to which kl_coef holds the policy"
            remedy = "put those back, or start a new run"
            raise Refusal(problem("model.path", self.conf.model.path, wrong, remedy))
        with torch.no_grad():
            state = {kind: local_tensors(part) for kind, part in self.trainer.state().items()}
        read_blocks(path, index, state, self.layouts, self.process.rank)
        self.trainer.continue_after(index.step, index.updates)
        digests = self.digests()
        if digests != index.digests:
            raise RuntimeError(f"{path} was saved as {index.digests} and loaded as {digests}")
        self.process.say(f"resumed from {path}: weights and moments are those that were saved")

    def _on_rank0(self, act: Callable[[], T]) -> T:
        return on_rank0(self.process, self.path, act)
