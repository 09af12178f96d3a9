"""The times of a step, gathered from all ranks: its line of the timeline, its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.lifecycle.memory import resident_gb
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
from mesh.model.flops import peak_flops
from mesh.program.assembly import Program
from mesh.runs.speed import FLOPS, HOST_GB, PEAK, SYNC_GB, SYNC_SECONDS, speed_metrics
from mesh.runs.timeline import log_timeline
from mesh.weights.bridge import SyncReport


@dataclass(frozen=True)
class Timings:
    """What `timings(step, metrics)` does at each logged step. run_dir: where the timeline is
    written; None: nowhere."""

    program: Program
    process: Process
    phases: Phases
    run_dir: Path | None

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of speed and memory of this step, which has `metrics` otherwise: all that was
        measured since the last call. One collective."""
        trainer, resident = self.program.trainer, resident_gb()
        self.phases.gauge(FLOPS, trainer.flops)
        trainer.flops = 0.0
        peak = 0.0 if trainer.model is None else peak_flops(self.process.device)
        self.phases.gauge(PEAK, peak)
        if resident is not None:
            self.phases.gauge(HOST_GB, resident)
        measured = self.phases.measured(self.process.cpu_group)
        if self.run_dir is not None and self.process.rank == 0:
            log_timeline(self.run_dir, step, measured, self.program.plan.layout)
        return speed_metrics(measured, metrics)


def note_sync(phases: Phases, report: SyncReport) -> None:
    """Have the step's sync among what is measured."""
    phases.gauge(SYNC_GB, report.bytes_moved / 1e9)
    phases.gauge(SYNC_SECONDS, report.transfer_seconds)
