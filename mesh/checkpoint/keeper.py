"""Writing, retention and loading of checkpoints.

A checkpoint is a copy of the state in host memory, taken between two steps, which a thread of each
rank writes into `checkpoints/step-N.partial` while training continues. Once all ranks have finished
- polled after every step - rank 0 writes the index and renames the directory to `step-N`: a
directory with that name is complete, even after a power loss. A checkpoint holds what the next step
needs and cannot recompute: fp32 weights and AdamW's moments. Prompts and random numbers are
functions of (seed, step); the frozen reference is read again from where the run began, and only its
digest is stored. It also holds the run's logs (`logs.py`) and its best evaluation (`best.py`).

The run directory must be visible to all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mesh.checkpoint.best import BestModel, Save, best_steps_in
from mesh.checkpoint.files import (
    Entry,
    Index,
    file_problem,
    read_blocks,
    write_index,
)
from mesh.checkpoint.folder import (
    PARTIAL,
    checked_index,
    discard,
    mark_damaged,
    on_rank0,
    prepare,
    remove,
    steps_in,
)
from mesh.checkpoint.logs import KEPT_LOGS, copy_jobs, restore_logs
from mesh.checkpoint.writing import CheckpointWriter, Pending, write_blocks
from mesh.config.keys import Refusal, problem
from mesh.config.schema import Conf
from mesh.layout.holdings import local_tensors
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.process import Process
from mesh.roles.trainer import Trainer
from mesh.weights.bridge import weights_digest

T = TypeVar("T")


class Checkpointer:
    """Owns RUN_DIR/checkpoints. Every public method is collective over the world."""

    def __init__(self, conf: Conf, run_dir: Path, process: Process, trainer: Trainer) -> None:
        """Construct before the first step. Raises RuntimeError if checkpoints are requested and
        their directory cannot be created."""
        self.conf, self.run_dir, self.process, self.trainer = conf, run_dir, process, trainer
        self.path = run_dir / "checkpoints"
        names = trainer.master_names
        self.layouts = [layout for layout in trainer.layouts if layout.name in names]
        held = {layout.name: layout.blocks.get(process.rank) for layout in self.layouts}
        holders = {layout.name: layout.holders() for layout in self.layouts}
        self.own = {  # the first holder of a block writes it
            name: block
            for name, block in held.items()
            if block is not None and holders[name][block][0] == process.rank
        }
        self.reference = self._reference_digest()
        self._pending: Pending | None = None
        self._logs: dict[str, Entry] = {}  # their entries in the previous checkpoint
        if conf.checkpoint.every or conf.resume:
            self._on_rank0(lambda: prepare(self.path))
        self.best = BestModel(conf, run_dir, process, trainer.settings.shape)

    def load(self) -> int:
        """Restore trainer, logs and best model from the newest intact checkpoint; returns its step.

        A damaged checkpoint is reported, renamed and skipped. Raises ValueError if none is left, or
        if it is of another model, reference or seed; RuntimeError if the digests of the loaded
        state differ from those of the saved one.
        """
        for step in self._on_rank0(lambda: steps_in(self.path)):
            path = self.path / f"step-{step}"
            if index := self._load(path):
                self._restore_files(path, index)
                return step
            self._on_rank0(lambda path=path: mark_damaged(path))  # type: ignore[misc]
        wrong = f"no intact checkpoint in {self.path}"
        raise Refusal(problem("resume", self.run_dir, wrong, "start a new run"))

    def load_before(self, limit: int) -> int:
        """Like `load`, from the newest one before step `limit`, without changing anything on disk.
        Returns 0, with the trainer unchanged, if there is none."""
        held = self._on_rank0(lambda: steps_in(self.path) if self.path.exists() else [])
        steps = (step for step in held if step < limit)
        return next((step for step in steps if self._load(self.path / f"step-{step}")), 0)

    def consider(self, step: int, metrics: Mapping[str, Any], save: Save) -> None:
        """Call when a step is logged, before `after`: if its metrics hold the best evaluation so
        far, `save(path)` writes the current model before any rank continues.
        """
        if self.best.improves(metrics):
            self.best.store(step, metrics, save)
            self._on_rank0(self._remove_bests)

    def after(self, step: int, stop: bool) -> None:
        """Call after every step, with the number of finished steps; `stop`: it was the last one.

        Writes a checkpoint every `checkpoint.every` steps and after the last one, and also, if none
        are requested, when a run is stopped early. Raises RuntimeError on all ranks if one could
        not be written; earlier ones are unaffected.
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
            self.best.report()
            if step < self.conf.steps:
                self.process.say(f"to continue after step {step}: resume={self.run_dir}")

    def digests(self) -> dict[str, str]:
        """Mesh-independent digests of each kind of trainer state and of the reference; that of the
        weights is the metric `digest/weights`, which counts a tied weight under both names."""
        trainer, group = self.trainer, self.process.cpu_group
        both = [layout for layout in trainer.layouts if layout.name in trainer.weight_names]
        state = trainer.state()
        weights = {"weights": weights_digest(trainer.parameters(), both, group)}
        moments = state.keys() - weights
        kinds = {k: weights_digest(state[k], self.layouts, group) for k in sorted(moments)}
        return weights | kinds | self.reference

    def _reference_digest(self) -> dict[str, str]:
        """Digest of the frozen reference's weights while they are sharded: FSDP leaves some
        gathered after a forward pass. Empty if the loss has no KL."""
        if not self.trainer.settings.reference:
            return {}
        weights, group = self.trainer.reference_weights(), self.process.cpu_group
        return {"reference": weights_digest(weights, self.layouts, group)}

    def _begin(self, step: int) -> None:
        self._on_rank0(lambda: prepare(self.path))  # missing if none were requested
        folder = self.path / f"step-{step}{PARTIAL}"
        shapes = {layout.name: layout.shape for layout in self.layouts}
        index = Index(
            step,
            self.trainer.updates,
            self.conf.seed,
            self.digests(),
            shapes,
            {},
            self.best.current,
            self.trainer.without_signal,
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
        self._on_rank0(lambda: jobs.update(copy_jobs(self.run_dir, folder, self._logs)))
        if tensors:  # none off the trainer, or if others write the replicas
            file = folder / f"rank-{self.process.rank}.safetensors"
            jobs[file] = partial(write_blocks, tensors, self.own)
        self._pending = Pending(index, CheckpointWriter(jobs))
        self._pending.writer.start()

    def _finish(self, wait: bool) -> None:
        """Complete the pending checkpoint if all ranks have written their files."""
        if self._pending is None:
            return
        index, writer = self._pending.index, self._pending.writer
        if wait:
            writer.join()
        outcomes = self.process.gather(writer.outcome)
        if any(outcome is None for outcome in outcomes):
            return
        self._pending = None
        wrong = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if wrong:
            self._abort(index.step, wrong)
        index = replace(index, files={n: entry for part in outcomes for n, entry in part.items()})
        self._on_rank0(lambda: self._complete(index))
        self._remember_logs(index)

    def _complete(self, index: Index) -> None:
        folder = self.path / f"step-{index.step}{PARTIAL}"
        for path in (self.run_dir / "config.yaml", self.run_dir):  # resuming reads it
            if path.exists():
                sync_path(path)
        write_index(folder, index)
        folder.rename(self.path / f"step-{index.step}")
        sync_path(self.path)
        self._remove_old()

    def _remember_logs(self, index: Index) -> None:
        self._logs = {name: index.files[name] for name in KEPT_LOGS if name in index.files}

    def _remove_old(self) -> None:
        for step in steps_in(self.path)[self.conf.checkpoint.keep :]:
            discard(self.path / f"step-{step}")
        self._remove_bests()

    def _remove_bests(self) -> None:
        pending = self._pending and self._pending.index.best
        self.best.prune(best_steps_in(self.path) | ({pending.step} if pending else set()))

    def _abort(self, step: int, wrong: list[str]) -> None:
        if self.process.rank == 0:
            with contextlib.suppress(OSError):  # report the first error
                remove(self.path / f"step-{step}{PARTIAL}")
        raise RuntimeError(
            f"the checkpoint of step {step} could not be written: {'; '.join(wrong)}; "
            f"fix that, then continue from the previous one with resume={self.run_dir}"
        )

    def _inspect(self, path: Path) -> tuple[Index | None, list[str]]:
        """A checkpoint's index, or its problems; the ranks divide the verification of its files."""
        index, wrong = self._on_rank0(lambda: checked_index(path))
        if index is None:
            return None, [wrong]
        names = sorted(index.files)[self.process.rank :: self.process.world_size]
        found = [file_problem(path / name, index.files[name]) for name in names]
        problems = [line for part in self.process.gather(found) for line in part if line]
        return (None, problems) if problems else (index, [])

    def _load(self, path: Path) -> Index | None:
        """Restore the trainer from a checkpoint; report a damaged one and return None."""
        index, wrong = self._inspect(path)
        if index is None:
            self.process.say(f"skipping {path}: {'; '.join(wrong)}")
            return None
        self._restore_trainer(path, index)
        return index

    def _restore_files(self, path: Path, index: Index) -> None:
        self._on_rank0(lambda: restore_logs(path, index.files, self.run_dir))
        self._remember_logs(index)
        self.best.restore(index.best)
        self._on_rank0(self._remove_old)  # the run may have died before doing so

    def _restore_trainer(self, path: Path, index: Index) -> None:
        if index.seed != self.conf.seed:
            wrong = f"{path} belongs to a run with seed {index.seed}"
            raise Refusal(problem("seed", self.conf.seed, wrong, f"use {index.seed}"))
        if index.digests.get("reference") != self.reference.get("reference"):
            wrong = f"its weights are not those that {path} has as reference of the KL (kl_coef)"
            remedy = "restore the original weights, or start a new run"
            raise Refusal(problem("model.path", self.conf.model.path, wrong, remedy))
        with torch.no_grad():
            state = {kind: local_tensors(part) for kind, part in self.trainer.state().items()}
        read_blocks(path, index, state, self.layouts, self.process.rank)
        self.trainer.continue_after(index.step, index.updates, index.without_signal)
        digests = self.digests()
        if digests != index.digests:
            raise RuntimeError(
                f"{path}: the loaded state has digests {digests}, the saved one {index.digests}"
            )
        self.process.say(f"resumed from {path}: the digests of weights and moments match")

    def _on_rank0(self, act: Callable[[], T]) -> T:
        return on_rank0(self.process, self.path, act)
