"""The log of a run: `metrics.jsonl`, `samples.jsonl.gz`, trackers, the progress display.

Only rank 0 writes, yet every rank calls: off rank 0 the verbs do nothing, so a recipe needs no
branch. Numbers that are the same on all ranks, or reduced to rank 0, are the recipe's to give.
"""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from mesh.config.sections import LogConf
from mesh.runs.feeds import Trackers
from mesh.runs.lines import line_of, plain
from mesh.runs.live import open_progress
from mesh.runs.progress import Metrics, Pace, clock
from mesh.runs.samples import SAMPLES, Mark, Row, SampleFile
from mesh.runs.thinning import Thinning
from mesh.runs.trackers import Entry
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
        row_of: Callable[[Row], Row] = dict,
    ):
        """`config` is shown by W&B and trackio. `first`: steps that a resumed run has taken, with
        which its files end: its checkpoint has restored them. row_of: makes the row of a sample, in
        a thread.

        Raises Refusal where a tracker asks for something that the user has to do.
        """
        self._active = rank == 0
        if not self._active:
            return
        self._run_dir, self._conf = run_dir, conf
        self._closed = self._told = False
        self._last: Metrics = {}
        self._warnings = StepWarnings()
        if first:
            self._last = last_logged(run_dir / "metrics.jsonl")
        self._trackers = Trackers(run_dir, conf, steps, config or {}, first)
        self._metrics_file = open(run_dir / "metrics.jsonl", "a")  # noqa: SIM115
        thinning = Thinning(conf.samples_mb * 1e6, steps)
        self._samples = SampleFile(run_dir / SAMPLES, row_of, thinning)
        self._pace = Pace(steps, step=first)
        self._progress = open_progress(self._pace, run_dir, conf.progress)

    def log(
        self,
        step: int,
        metrics: Metrics,
        samples: Sequence[Row] = (),
        histograms: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> None:
        """Log one step, once: one line of `metrics.jsonl`, flushed. Prints the warnings that it
        calls for.

        `step` counts finished optimizer steps. NaN and infinities, which JSON lacks, become null
        there; the display and trackers show them as they are. samples: rollouts, of which groups
        follow each other, one line of `samples.jsonl.gz` each, written later. histograms: values by
        name, which trackers alone get. RuntimeError if this, or samples of before, cannot be
        written.
        """
        if not self._active:
            return
        metrics = {key: plain(metrics[key]) for key in sorted(metrics)}
        write_line(self._metrics_file, {"step": step} | metrics)
        scalars = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        self._samples.put(step, samples, partial(self._tell, step, Entry(scalars, histograms)))
        self._last = _of_eval(self._last) | metrics
        self._pace.advance(step)
        self._progress.update(self._last, evaluated="eval/accuracy" in metrics)
        warnings = self._warnings.see(step, metrics)
        if self._samples.left_out and not self._told:
            self._told = True
            warnings = [*warnings, thinned(step, self._conf.samples_mb)]
        for text in warnings:
            print(text, flush=True)

    def mark(self) -> Mark | None:
        """The place in `samples.jsonl.gz` behind what was logged; None off rank 0."""
        return self._samples.mark() if self._active else None

    def _tell(self, step: int, entry: Entry, rows: Sequence[Row]) -> None:
        """Tell the trackers of a step, once its rows are there."""
        self._trackers.log(step, replace(entry, samples=rows))

    def leave_out(self) -> None:
        """Leave the last step, up to now, out of the displayed pace."""
        if self._active:
            self._pace.leave_out()

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
            # a full disk may be why the run ends
            with contextlib.suppress(OSError, RuntimeError, queue.Full):
                self._end(FAILED_SECONDS, FAILED_SECONDS)

    def _end(self, seconds: float, for_samples: float | None = None) -> None:
        """Close everything, the trackers within so many seconds each; None: without a limit."""
        self._closed = True
        self._progress.close()
        self._metrics_file.close()
        try:
            self._samples.close(for_samples)
        finally:
            self._trackers.close(seconds)

    def _summary(self) -> str:
        pace = self._pace
        words = [
            "done" if pace.step >= pace.steps else "stopped",
            f"{pace.step}/{pace.steps} steps",
        ]
        if "eval/accuracy" in self._last:
            words.append(f"eval {self._last['eval/accuracy']:.3f}")
        words.append(f"wall {clock(pace.now() - pace.began)}")
        words += self._trackers.summaries()
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


def thinned(step: int, most: float) -> str:
    """The warning that samples are left out."""
    return (
        f"warning: {SAMPLES} grows faster than log.samples_mb={most:g} allows, so from step {step} "
        "on it has the rollouts of some steps only; raise it, or lower log.samples"
    )


def write_line(file: TextIO, record: dict[str, Any]) -> None:
    """Append a line to a log, flushed. Raises RuntimeError where it cannot be written."""
    try:
        file.write(line_of(record) + "\n")
        file.flush()
    except OSError as error:
        raise RuntimeError(f"{file.name}: cannot be written ({error.strerror})") from error
