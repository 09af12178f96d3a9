"""The model of the best evaluation so far, as a Hugging Face directory RUN_DIR/best/step-N.

Best is the largest `eval/accuracy`; of equal ones the first. The directory is whole when it has
that name: it is written under another one, reaches the disk, and is renamed. A checkpoint names the
best of its step, so a directory stays while it is the best or a kept checkpoint names it: a run
that is resumed goes on with the best it had at that step, whatever it had found before it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mesh.checkpoint.files import Best
from mesh.checkpoint.folder import indexed, on_rank0, prepare, refuse_link, retire, steps_in
from mesh.config.schema import Conf
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.process import Process
from mesh.model.hf import weight_problems
from mesh.types import ModelShape

METRIC = "eval/accuracy"
Save = Callable[[Path], None]


class BestModel:
    """Owns RUN_DIR/best. Its verbs are collectives of the world, but for `prune`."""

    def __init__(self, conf: Conf, run_dir: Path, process: Process, shape: ModelShape) -> None:
        self.run_dir, self.path = run_dir, run_dir / "best"
        self.process, self.shape = process, shape
        self.wanted = conf.checkpoint.every > 0 and conf.checkpoint.best
        self.now: Best | None = None
        if self.wanted:
            on_rank0(process, self.path, lambda: prepare(self.path))

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def is_beaten(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a step's metrics, the same on all ranks, hold a better evaluation."""
        if not self.wanted or METRIC not in metrics:
            return False
        return self.now is None or metrics[METRIC] > self.now.value

    def keep(self, step: int, metrics: Mapping[str, Any], save: Save) -> None:
        """Write the model by `save`, to which all ranks go together. Raises RuntimeError where it
        cannot be written; the best one before it stays."""
        path = self.folder(step)
        on_rank0(self.process, path, lambda: retire(path) if path.exists() else None)
        try:
            save(path)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"the best model, of step {step}, could not be written to {path}: {error}; mend "
                f"that, then resume={self.run_dir} goes on from the last checkpoint"
            ) from error
        on_rank0(self.process, self.path, lambda: sync_path(self.path))  # now no rank is ahead
        self.now = Best(step, float(metrics[METRIC]))

    def take(self, best: Best | None) -> None:
        """Go on with the best model that a checkpoint names. Where it is not whole any more, a
        line says so and the next evaluation is the best."""
        self.now = best
        wrong = on_rank0(self.process, self.path, lambda: self._problems(best))
        if best is not None and wrong:
            self.process.say(
                f"{self.folder(best.step)} is not whole: {'; '.join(wrong)}; the best model so far "
                "is lost, and the next evaluation counts as the best"
            )
            self.now = None

    def _problems(self, best: Best | None) -> list[str]:
        if best is None or not self.wanted:
            return []
        path = self.folder(best.step)
        if self.path.is_symlink() or path.is_symlink():
            return ["is a symbolic link, which is not followed"]
        return weight_problems(path, self.shape)

    def prune(self, named: Collection[int]) -> None:
        """Remove all but the best one and those of the `named` steps; a run that keeps none leaves
        what is there. One that cannot be removed, say as somebody reads it over NFS, is named.
        """
        if not self.wanted:
            return
        kept = {*named, *([self.now.step] if self.now else [])}
        for step in steps_in(self.path):
            if step in kept:
                continue
            try:
                retire(self.folder(step))
            except OSError as error:
                self.process.say(f"{self.folder(step)} stays, it could not be removed: {error}")

    def say(self) -> None:
        """A line that says where it is."""
        if self.now is not None:
            where = self.folder(self.now.step)
            self.process.say(
                f"best: {METRIC} {self.now.value:.3f} of step {self.now.step}, {where}"
            )


def named_in(checkpoints: Path) -> set[int]:
    """The steps of the best models that whole checkpoints name."""
    refuse_link(checkpoints)
    found = (indexed(checkpoints / f"step-{step}")[0] for step in steps_in(checkpoints))
    return {index.best.step for index in found if index is not None and index.best is not None}
