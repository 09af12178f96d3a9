"""The model of the best evaluation so far, as a Hugging Face directory RUN_DIR/best/step-N.

Best is the largest value of `checkpoint.best_metric`, or the smallest where its name has a minus in
front; ties go to the first. A directory with that
name is complete: it is written under another one, flushed to disk, and renamed. A checkpoint names
the best model of its step, so a directory stays while it is the best or a kept checkpoint names it:
a resumed run continues with the best it had at that step, whatever it found later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mesh.checkpoint.files import Best
from mesh.checkpoint.folder import checked_index, discard, on_rank0, prepare, refuse_link, steps_in
from mesh.config.evaluation_sets import as_own, ks_of, set_confs
from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.config.spelling import nearest
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.process import Process
from mesh.model.weight_checks import weight_problems
from mesh.roles.answers import metric_names
from mesh.roles.evaluation import prefix_of
from mesh.types import ModelShape

SMALLEST = "-"
"""In front of a metric whose smallest value is the best."""

Save = Callable[[Path], None]


class BestModel:
    """Owns RUN_DIR/best. `store` and `restore` are collective over the world."""

    def __init__(self, conf: Conf, run_dir: Path, process: Process, shape: ModelShape) -> None:
        self.run_dir, self.path = run_dir, run_dir / "best"
        self.process, self.shape = process, shape
        self.wanted = conf.checkpoint.every > 0 and conf.checkpoint.best
        self.metric = conf.checkpoint.best_metric
        self.name = self.metric.removeprefix(SMALLEST)  # in a step's metrics
        self.warned = False
        self.current: Best | None = None
        if self.wanted:
            on_rank0(process, self.path, lambda: prepare(self.path))

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """True if a step's metrics, the same on all ranks, hold a better evaluation."""
        if not self.wanted:
            return False
        if self.name not in metrics:
            self._warn_of_none(metrics)
            return False
        if self.current is None:
            return True
        value, best = metrics[self.name], self.current.value
        return value < best if self.metric.startswith(SMALLEST) else value > best

    def store(self, step: int, metrics: Mapping[str, Any], save: Save) -> None:
        """Write the model with `save`, which all ranks call. Raises RuntimeError if it cannot be
        written; the previous best model stays."""
        path = self.folder(step)
        on_rank0(self.process, path, lambda: discard(path) if path.exists() else None)
        try:
            save(path)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"the best model, of step {step}, could not be written to {path}: {error}"
            ) from error
        on_rank0(self.process, self.path, lambda: sync_path(self.path))  # also a barrier
        self.current = Best(step, float(metrics[self.name]), self.metric)

    def restore(self, best: Best | None) -> None:
        """Continue with the best model that a checkpoint names. If it has been damaged since, or
        was the best by another metric, report that; the next evaluation is then the best."""
        self.current = best
        if best is not None and self.wanted and best.metric != self.metric:
            self.process.say(
                f"checkpoint.best_metric={self.metric}: the best model so far, "
                f"{self.folder(best.step)}, followed {best.metric}; the next evaluation becomes "
                "the best, and that one is removed with the last checkpoint that names it"
            )
            self.current = None
            return
        wrong = on_rank0(self.process, self.path, lambda: self._problems(best))
        if best is not None and wrong:
            self.process.say(
                f"{self.folder(best.step)} is damaged: {'; '.join(wrong)}; that best model is "
                "lost, and the next evaluation becomes the best"
            )
            self.current = None

    def _problems(self, best: Best | None) -> list[str]:
        if best is None or not self.wanted:
            return []
        path = self.folder(best.step)
        if self.path.is_symlink() or path.is_symlink():
            return ["is a symbolic link, which is not followed"]
        return weight_problems(path, self.shape)

    def _warn_of_none(self, metrics: Mapping[str, Any]) -> None:
        """Say, once, that an evaluation does not have the metric: a part that no score has."""
        logged = sorted(name for name in metrics if name.startswith("eval/"))
        if logged and not self.warned:
            self.warned = True
            self.process.say(
                f"warning: checkpoint.best_metric={self.metric}: this evaluation does not have it, "
                f"and until one has, no best model is kept; it has {', '.join(logged)}"
            )

    def prune(self, named: Collection[int]) -> None:
        """Remove all but the best model and those of the `named` steps; no-op if best models are
        not requested. One that cannot be removed, e.g. while read over NFS, is reported.
        """
        if not self.wanted:
            return
        kept = {*named, *([self.current.step] if self.current else [])}
        for step in steps_in(self.path):
            if step in kept:
                continue
            try:
                discard(self.folder(step))
            except OSError as error:
                self.process.say(f"could not remove {self.folder(step)}: {error}")

    def report(self) -> None:
        """Print the best evaluation and its model's directory."""
        if self.current is not None:
            step, value = self.current.step, self.current.value
            metric = self.current.metric.removeprefix(SMALLEST)
            self.process.say(f"best: {metric} {value:.3f} of step {step}, {self.folder(step)}")


def best_metric_problems(conf: Conf) -> list[str]:
    """A best model by a metric that no evaluation of the run logs."""
    return metric_problems(conf, "checkpoint.best_metric", conf.checkpoint.best_metric)


def metric_problems(conf: Conf, key: str, given: str, either: bool = True) -> list[str]:
    """A metric to follow, the value of `key`, that no evaluation of the run logs. Parts of scores
    have any name. either: it may begin with a minus, for the smallest value."""
    choices = evaluation_metrics(conf)
    metric = given.removeprefix(SMALLEST) if either else given
    parts = [f"{name}/" for name in choices if name.endswith("/reward")]
    part = any(metric.startswith(prefix) and metric != prefix for prefix in parts)
    if metric in choices or part:
        return []
    close = nearest(metric, choices)
    meant = f"did you mean {close}? " if close else ""
    wrong = "no evaluation of the run logs it"
    if metric.removeprefix(SMALLEST) in choices:
        wrong = "it asks for the smallest value, and a run ends by one that is to grow"
    elif not metric.startswith("eval/"):
        wrong += ", and a step's own metrics are of the weights before its update"
    remedy = f"{meant}use one of {', '.join(choices)}, or eval/reward/PART of a score with parts"
    return [problem(key, given, wrong, remedy)]


def evaluation_metrics(conf: Conf) -> list[str]:
    """The metrics of the run's evaluations, without the parts of scores."""
    sets = {"": conf} | {name: as_own(conf, keys) for name, keys in set_confs(conf).items()}
    failed = conf.reward.on_failure == "zero"
    return [
        metric
        for name, own in sets.items()
        for metric in [
            *metric_names(ks_of(own), own.eval.greedy, prefix_of(name)),
            *([f"{prefix_of(name)}/failed"] if failed else []),
        ]
    ]


def best_steps_in(checkpoints: Path) -> set[int]:
    """Steps of the best models that complete checkpoints name."""
    refuse_link(checkpoints)
    found = (checked_index(checkpoints / f"step-{step}")[0] for step in steps_in(checkpoints))
    return {index.best.step for index in found if index is not None and index.best is not None}
