"""The log of a run: `metrics.jsonl`, `samples.jsonl`, trackers, the progress display.

Only rank 0 writes, yet every rank calls: off rank 0 the verbs do nothing, so a recipe needs no
branch. Numbers that are the same on all ranks, or reduced to rank 0, are the recipe's to give.
"""

from __future__ import annotations

import contextlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from mesh.config.sections import LogConf
from mesh.runs.live import open_progress
from mesh.runs.progress import Metrics, Pace, clock
from mesh.runs.trackers import Feed, TensorBoard, Wandb
from mesh.runs.warnings import StepWarnings

FINISH_SECONDS = 60.0  # the longest wait for the trackers at the end of a run
FAILED_SECONDS = 5.0  # and after a failure: the other ranks wait


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

        Raises Refusal where W&B asks for something that the user has to do.
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
        self._trackers = []
        if conf.tensorboard:
            self._trackers.append(Feed("TensorBoard", partial(TensorBoard, run_dir, first)))
        if conf.wandb:
            self._trackers.append(Feed("W&B", partial(Wandb, conf.wandb, run_dir, config or {})))
        self._metrics_file = open(run_dir / "metrics.jsonl", "a")  # noqa: SIM115
        self._samples_file = open(run_dir / "samples.jsonl", "a")  # noqa: SIM115
        self._pace = Pace(steps, step=first)
        self._progress = open_progress(self._pace, run_dir, conf.progress)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log one step, once: one line of `metrics.jsonl`, flushed. Prints the warnings that it
        calls for.

        `step` counts finished optimizer steps. NaN and infinities, which JSON lacks, become null
        there; the display and trackers show them as they are.
        """
        if not self._active:
            return
        metrics = {key: _plain(metrics[key]) for key in sorted(metrics)}
        write_line(self._metrics_file, {"step": step} | metrics)
        scalars = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(step, scalars)
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
            write_line(self._samples_file, {"step": step} | sample)

    def close(self) -> None:
        """Flush everything and print the run's directory."""
        if not self._active or self._closed:
            return
        self._end(FINISH_SECONDS)
        print(self._summary(), flush=True)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif self._active and not self._closed:
            with contextlib.suppress(OSError):  # a full disk may be why the run ends
                self._end(FAILED_SECONDS)

    def _end(self, seconds: float) -> None:
        """Close everything, the trackers within so many seconds each."""
        self._closed = True
        self._progress.close()
        self._metrics_file.close()
        self._samples_file.close()
        for tracker in self._trackers:
            tracker.close(seconds)

    def _summary(self) -> str:
        pace = self._pace
        words = [
            "done" if pace.step >= pace.steps else "stopped",
            f"{pace.step}/{pace.steps} steps",
        ]
        if "eval/accuracy" in self._last:
            words.append(f"eval {self._last['eval/accuracy']:.3f}")
        words.append(f"wall {clock(pace.now() - pace.began)}")
        words += [text for tracker in self._trackers if (text := tracker.summary())]
        return "  ".join([*words, f"run {self._run_dir}"])


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


def write_line(file: TextIO, record: dict[str, Any]) -> None:
    """Append a line to a log, flushed. Raises RuntimeError where it cannot be written."""
    try:
        file.write(line_of(record) + "\n")
        file.flush()
    except OSError as error:
        raise RuntimeError(f"{file.name}: cannot be written ({error.strerror})") from error
