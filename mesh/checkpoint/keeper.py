"""Writing, retention and loading of checkpoints.

A checkpoint is a copy of the state in host memory, taken between two steps, which a thread of each
rank writes into `checkpoints/step-N.partial` while training continues. Once all ranks have finished
- polled after every step - rank 0 writes the index and renames the directory to `step-N`: a
directory with that name is complete, even after a power loss. A checkpoint holds what the next step
needs and cannot recompute: fp32 weights and AdamW's moments. Prompts and random numbers are
functions of (seed, step); frozen models are read again from their directories, and only their
digest is stored. A copy of the run's logs (`logs.py`) and its best model (`best.py`) are elsewhere.

The run directory must be visible to all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mesh.checkpoint.best import BestModel, Save, best_steps_in
from mesh.checkpoint.files import Entry, Index, write_index
from mesh.checkpoint.folder import (
    OLD,
    PARTIAL,
    checked_index,
    discard,
    mark_damaged,
    on_rank0,
    prepare,
    remove,
    steps_in,
)
from mesh.checkpoint.logs import KEPT_LOGS, copy_jobs, log_sizes, restore_logs, stored_problem
from mesh.checkpoint.pass_rates import rates_job, read_rates
from mesh.checkpoint.rescue import Rescue, first_held
from mesh.checkpoint.same_run import (
    Inputs,
    frozen_digests,
    refuse_another_run,
    refuse_fewer_steps,
)
from mesh.checkpoint.state import (
    host_copies,
    own_blocks,
    restore_state,
    state_digests,
    with_own,
)
from mesh.checkpoint.unlogged import read_unlogged
from mesh.checkpoint.writing import CheckpointWriter, Pending, write_blocks
from mesh.config.keys import Refusal, problem
from mesh.config.schema import Conf
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.process import Process
from mesh.rl.samples import StepRecord
from mesh.roles.trainer import Trainer
from mesh.runs.samples import Mark
from mesh.tasks.difficulty import PassRates

T = TypeVar("T")


class Checkpointer:
    """Owns RUN_DIR/checkpoints. Every public method is collective over the world."""

    def __init__(
        self, conf: Conf, run_dir: Path, process: Process, trainer: Trainer, inputs: Inputs,
        pass_rates: PassRates | None = None,
    ) -> None:  # fmt: skip
        """Construct before the first step. Raises RuntimeError if checkpoints are requested and
        their directory cannot be created."""
        self.conf, self.run_dir, self.process, self.trainer = conf, run_dir, process, trainer
        self.pass_rates = pass_rates or PassRates()
        self.path = run_dir / "checkpoints"
        names = trainer.master_names
        self.layouts = [layout for layout in trainer.layouts if layout.name in names]
        self.digested = [one for one in trainer.layouts if one.name in trainer.weight_names]
        mine = first_held(self.layouts, process.rank)  # the first holder of a block writes it
        self.own = {layout.name: layout.blocks[process.rank] for layout in mine}
        self.frozen = frozen_digests(trainer, process.cpu_group)
        self.inputs, self.recorded, self.drawn = inputs, inputs.record(conf), ""
        self.pending: Pending | None = None
        self.unlogged: StepRecord | None = None  # of the step with which the run continues
        self.logs: dict[str, Entry] = {}  # their entries in the previous checkpoint
        self.samples: Callable[[], Mark | None] = lambda: None
        if conf.checkpoint.every or conf.resume:
            self._on_rank0(lambda: prepare(self.path))
        self.best = BestModel(conf, run_dir, process, trainer.settings.shape)
        self.rescue = Rescue(self)
        process.guard.rescue = self.rescue

    def load(self) -> int:
        """Restore trainer, logs and best model from the newest intact checkpoint; returns the last
        step that it has logged.

        A damaged checkpoint is reported, renamed and skipped. Raises ValueError if none is left, if
        it is of another model or run (`same_run.py`), or of more steps than are to be taken;
        RuntimeError if the digests of the loaded state differ from those of the saved one.
        """
        for step in self._on_rank0(lambda: steps_in(self.path)):
            path = self.path / f"step-{step}"
            if index := self._load(path):
                refuse_fewer_steps(self.conf, step)
                self.drawn = index.inputs.get("prompts", "")
                self._restore_files(path, index)
                self.unlogged = read_unlogged(path, index.files)
                self._note(step, self.unlogged)
                return step if self.unlogged is None else step - 1
            self._on_rank0(lambda path=path: mark_damaged(path))  # type: ignore[misc]
        wrong = f"no intact checkpoint in {self.path}"
        raise Refusal(problem("resume", self.run_dir, wrong, "start a new run"))

    def load_before(self, limit: int) -> int:
        """Like `load`, from the newest one before step `limit`, without changing anything on disk.
        Returns 0, with the trainer unchanged, if there is none."""
        held = self._on_rank0(lambda: steps_in(self.path) if self.path.exists() else [])
        steps = (step for step in held if step < limit)
        return next((step for step in steps if self._load(self.path / f"step-{step}")), 0)

    def follow(self, samples: Callable[[], Mark | None]) -> None:
        """Call when the logs are open. samples: marks the end of what was logged of rollouts, which
        a thread writes."""
        self.samples = samples

    def trained(self, step: int, record: StepRecord) -> None:
        """Call when a step has been trained, before it is evaluated and logged: if the run fails
        before that, resuming does it."""
        self.drawn = record.metrics.get("digest/prompts", "")
        self._note(step, record)

    def to_log(self) -> StepRecord | None:
        """A step that was trained but not logged when the run failed, which is the resumed run's
        first; rank 0 has all samples. None, as of then: train one."""
        found, self.unlogged = self.unlogged, None
        if found is None or self.process.rank == 0:
            return found
        return replace(found, samples=[])

    def consider(self, step: int, metrics: Mapping[str, Any], save: Save) -> None:
        """Call when a step is logged, before `after`: if its metrics hold the best evaluation so
        far, `save(path)` writes the current model before any rank continues.
        """
        if self.best.improves(metrics):
            self.best.store(step, metrics, save)
            self._on_rank0(self._remove_bests)

    def after(self, step: int, stop: bool, done: bool = False) -> None:
        """Call after every step, with the number of finished steps; `stop`: the run is stopped
        after it; `done`: it ends with it, as with the last one.

        Writes a checkpoint every `checkpoint.every` steps and after the last one, and also, if none
        are requested, when a run is stopped early. Raises RuntimeError on all ranks if one could
        not be written; earlier ones are unaffected.
        """
        self._note(step)  # before anything here can fail
        every, done = self.conf.checkpoint.every, done or step == self.conf.steps
        ending = stop or done
        if not every and (done or not stop):
            return
        due = ending or step % every == 0
        self._finish(wait=due)
        if due:
            self._begin(step)
        if ending:
            self._finish(wait=True)
            self.best.report()
            if not done:
                self.process.say(f"to continue after step {step}: resume={self.run_dir}")

    def digests(self) -> dict[str, str]:
        """Mesh-independent digests of each kind of trainer state and of frozen models; that of the
        weights is the metric `digest/weights`."""
        found = state_digests(self.process, self.trainer, self.layouts, self.digested)
        return found | self.frozen

    def _note(self, step: int, unlogged: StepRecord | None = None) -> None:
        """Have the state of this step saved if the run fails before the next one is trained."""
        self.rescue.note(self._index(step), log_sizes(self.run_dir, self.samples()), unlogged)

    def _index(self, step: int) -> Index:
        """The index of the state after this step, without digests and files."""
        shapes = {layout.name: layout.shape for layout in self.layouts}
        updates, without_signal = self.trainer.updates, self.trainer.without_signal
        best, seed = self.best.current, self.conf.seed
        inputs = self.recorded | {"prompts": self.drawn}
        index = Index(step, updates, seed, {}, shapes, {}, best, without_signal, inputs)
        return with_own(index, self.trainer)

    def _begin(self, step: int) -> None:
        self._on_rank0(lambda: prepare(self.path))  # missing if none were requested
        folder = self.path / f"step-{step}{PARTIAL}"
        index = replace(self._index(step), digests=self.digests())
        self._on_rank0(lambda: folder.mkdir())
        own = self.own | own_blocks(self.trainer, self.process.rank)
        tensors = host_copies(self.trainer, own)
        jobs = rates_job(folder, self.pass_rates.kept if self.process.rank == 0 else None)
        sizes = log_sizes(self.run_dir, self.samples())
        self._on_rank0(lambda: jobs.update(copy_jobs(self.run_dir, self.logs, sizes(None))))
        if tensors:  # none off the trainer, or if others write the replicas
            file = folder / f"rank-{self.process.rank}.safetensors"
            jobs[file] = partial(write_blocks, tensors, own)
        self.pending = Pending(index, CheckpointWriter(jobs))
        self.pending.writer.start()

    def _finish(self, wait: bool) -> None:
        """Complete the pending checkpoint if all ranks have written their files."""
        if self.pending is None:
            return
        index, writer = self.pending.index, self.pending.writer
        if wait:
            writer.join()
        outcomes = self.process.gather(writer.outcome)
        if any(outcome is None for outcome in outcomes):
            return
        self.pending = None
        wrong = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if wrong:
            self._abort(index.step, wrong)
        index = replace(index, files={n: entry for part in outcomes for n, entry in part.items()})
        self._on_rank0(lambda: self.complete(index))
        self._remember_logs(index)

    def complete(self, index: Index) -> None:
        whole = self.path / f"step-{index.step}"
        folder, old = (whole.with_name(whole.name + end) for end in (PARTIAL, OLD))
        for path in (self.run_dir / "config.yaml", self.run_dir):  # resuming reads it
            if path.exists():
                sync_path(path)
        write_index(folder, index)
        if whole.exists():  # of the same step, before it was logged
            whole.rename(old)
        folder.rename(whole)
        sync_path(self.path)
        if old.exists():
            remove(old)
        self._remove_old()

    def _remember_logs(self, index: Index) -> None:
        self.logs = {name: index.files[name] for name in KEPT_LOGS if name in index.files}

    def _remove_old(self) -> None:
        for step in steps_in(self.path)[self.conf.checkpoint.keep :]:
            discard(self.path / f"step-{step}")
        self._remove_bests()

    def _remove_bests(self) -> None:
        pending = self.pending and self.pending.index.best
        self.best.prune(best_steps_in(self.path) | ({pending.step} if pending else set()))

    def _abort(self, step: int, wrong: list[str]) -> None:
        if self.process.rank == 0:
            with contextlib.suppress(OSError):  # report the first error
                remove(self.path / f"step-{step}{PARTIAL}")
        raise RuntimeError(
            f"the checkpoint of step {step} could not be written: {'; '.join(wrong)}"
        )

    def _inspect(self, path: Path) -> tuple[Index | None, list[str]]:
        """A checkpoint's index, or its problems; the ranks divide the verification of its files."""
        index, wrong = self._on_rank0(lambda: checked_index(path))
        if index is None:
            return None, [wrong]
        names = sorted(index.files)[self.process.rank :: self.process.world_size]
        found = [stored_problem(path, name, index.files[name], self.run_dir) for name in names]
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
        refuse_another_run(self.process, path, index, self.conf, self.inputs, self.frozen)
        restore_state(self.process, self.trainer, path, index, self.layouts)
        self.trainer.continue_after(index.step, index.updates, index.without_signal)
        self.pass_rates.restore(read_rates(path, index.files))
        digests = self.digests()
        if digests != index.digests:
            raise RuntimeError(
                f"{path}: the loaded state has digests {digests}, the saved one {index.digests}"
            )
        self.process.say(f"resumed from {path}: the digests of weights and moments match")

    def _on_rank0(self, act: Callable[[], T]) -> T:
        return on_rank0(self.process, self.path, act)
