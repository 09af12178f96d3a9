"""The log of a run: `metrics.jsonl`, `samples.jsonl`, TensorBoard, W&B, the progress display.

Only rank 0 writes, yet every rank calls: off rank 0 the verbs do nothing, so a recipe needs no
branch. Numbers that are the same on all ranks, or reduced to rank 0, are the recipe's to give.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from pathlib import Path
from typing import Any, TextIO

from mesh.config.keys import Refusal
from mesh.config.schema import LogConf
from mesh.runs.progress import Metrics, Pace, clock, open_progress
from mesh.runs.warnings import StepWarnings

WANDB_ID = "wandb-id.txt"


class MetricsLogger:
    """The log of one run; a context manager that closes it."""

    def __init__(
        self,
        run_dir: Path,
        conf: LogConf,
        rank: int,
        steps: int,
        config: dict[str, Any] | None = None,
        first: int = 0,
    ):
        """`config` is shown by W&B. `first`: steps that a resumed run has taken, with which its
        files end: its checkpoint has restored them.

        Raises Refusal where `log.tensorboard` or `log.wandb` asks for a missing package.
        """
        self._active = rank == 0
        if not self._active:
            return
        self._run_dir, self._conf = run_dir, conf
        self._closed = False
        self._last: Metrics = {}
        self._warnings = StepWarnings()
        if first:
            self._last = last_logged(run_dir / "metrics.jsonl")
        self._tensorboard = _open_tensorboard(run_dir, first) if conf.tensorboard else None
        self._wandb = _open_wandb(conf.wandb, run_dir, config or {}) if conf.wandb else None
        self._metrics_file = open(run_dir / "metrics.jsonl", "a")  # noqa: SIM115
        self._samples_file = open(run_dir / "samples.jsonl", "a")  # noqa: SIM115
        self._pace = Pace(steps, step=first)
        self._progress = open_progress(self._pace, run_dir, conf.progress)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log one step, once: one line of `metrics.jsonl`, flushed. Prints the warnings that it
        calls for.

        `step` counts finished optimizer steps. NaN and infinities, which JSON lacks, become null
        there; the display and TensorBoard show them as they are.
        """
        if not self._active:
            return
        metrics = {key: _plain(metrics[key]) for key in sorted(metrics)}
        _write_line(self._metrics_file, {"step": step} | metrics)
        scalars = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars | {"step": step})
        self._last = _of_eval(self._last) | metrics
        self._pace.advance(step)
        self._progress.update(self._last, evaluated="eval/accuracy" in metrics)
        for text in self._warnings.see(step, metrics):
            print(text, flush=True)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """The step's first `log.samples` rollouts (-1: all), one line of `samples.jsonl` each."""
        if not self._active:
            return
        wanted = len(samples) if self._conf.samples < 0 else self._conf.samples
        for sample in samples[:wanted]:
            _write_line(self._samples_file, {"step": step} | sample)

    def close(self) -> None:
        """Flush everything and print the run's directory."""
        if not self._active or self._closed:
            return
        self._end()
        if self._wandb is not None:
            self._wandb.finish()
        print(self._summary(), flush=True)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif self._active and not self._closed:
            with contextlib.suppress(OSError):  # a full disk may be why the run ends
                self._end()  # not W&B: its upload may take long, and the other ranks wait

    def _end(self) -> None:
        self._closed = True
        self._progress.close()
        self._metrics_file.close()
        self._samples_file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _summary(self) -> str:
        pace = self._pace
        words = [
            "done" if pace.step >= pace.steps else "stopped",
            f"{pace.step}/{pace.steps} steps",
        ]
        if "eval/accuracy" in self._last:
            words.append(f"eval {self._last['eval/accuracy']:.3f}")
        words += [f"wall {clock(pace.now() - pace.began)}", f"run {self._run_dir}"]
        return "  ".join(words)


def last_logged(path: Path) -> Metrics:
    """The last metrics of a file of JSON lines, the last evaluation's among them."""
    last: Metrics = {}
    with open(path) as file:
        for line in file:
            last = _of_eval(last) | json.loads(line)
    return last


def _of_eval(metrics: Metrics) -> Metrics:
    return {key: value for key, value in metrics.items() if key.startswith("eval/")}


def _plain(value: Any) -> Any:
    """A Python number of a tensor or numpy scalar."""
    return value.item() if hasattr(value, "item") else value


def _json(value: Any) -> Any:
    """`value` with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    value = _plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line_of(record: dict[str, Any]) -> str:
    """A line of a log, without its newline."""
    return json.dumps(_json(record), ensure_ascii=False, allow_nan=False)


def _write_line(file: TextIO, record: dict[str, Any]) -> None:
    try:
        file.write(line_of(record) + "\n")
        file.flush()
    except OSError as error:
        wrong = f"{file.name}: cannot be written ({error.strerror})"
        raise RuntimeError(f"{wrong}; fix that, then resume from the last checkpoint") from error


def _open_tensorboard(run_dir: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = "pip install tensorboard, or set log.tensorboard=false"
        raise Refusal(f"log.tensorboard=true: tensorboard is not installed; {remedy}") from error
    purge = first + 1 if first else None  # the events of later steps
    return SummaryWriter(str(run_dir / "tensorboard"), flush_secs=10, purge_step=purge)


def _open_wandb(project: str, run_dir: Path, config: dict[str, Any]) -> Any:
    """The W&B run of this run directory, the same one whenever it is resumed. The API key stays
    where W&B keeps it: in its own files or WANDB_API_KEY."""
    try:
        import wandb
    except ImportError as error:
        remedy = "pip install wandb, or leave log.wandb unset"
        raise Refusal(f"log.wandb={project}: wandb is not installed; {remedy}") from error
    path = run_dir / WANDB_ID
    if not path.exists() or not path.read_text().strip():  # killed as it was written
        path.write_text(secrets.token_hex(4) + "\n")
    run = wandb.init(
        project=project, name=run_dir.name, dir=str(run_dir), config=config,
        allow_val_change=True,  # a resumed run may have other `steps`
        id=path.read_text().strip(), resume="allow",
    )  # fmt: skip
    # W&B ignores values for a step of its own counter that it has: ours may be logged again
    run.define_metric("*", step_metric="step")
    return run
