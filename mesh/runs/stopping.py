"""Early stopping: the end of a run that its evaluations decide.

The decision is a function of the evaluations so far, which the log holds. So a resumed run, whose
log is that of its checkpoint, decides as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.config.sections import StopConf
from mesh.lifecycle.process import Process
from mesh.runs.lines import read_lines


def stop_reason(rule: StopConf, values: Sequence[tuple[int, float]]) -> str:
    """Why a run ends after these evaluations, (step, value) in order; empty: it goes on.

    A value improves where it exceeds all before it, and one that is not finite never does.
    """
    finite = [(step, value if math.isfinite(value) else -math.inf) for step, value in values]
    if not finite:
        return ""
    step, value = finite[-1]
    if rule.above is not None and value >= rule.above:
        return f"{rule.metric} is {value:g} at step {step}: stop.above={rule.above:g}"
    best, since = max(finite, key=lambda one: (one[1], -one[0])), 0
    for one in reversed(finite):
        if one == best:
            break
        since += 1
    if rule.after is None or since < rule.after:
        return ""
    shown = f"{rule.metric} is {best[1]:g} at step {best[0]}"
    return f"{shown} and has not improved in {since} evaluations: stop.after={rule.after}"


@dataclass
class EarlyStop:
    """Owns the evaluations that the rule asks for, all ranks alike."""

    rule: StopConf
    values: list[tuple[int, float]] = field(default_factory=list)

    def see(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in a step's metrics, which may hold an evaluation."""
        if self.rule.metric in metrics:
            value = metrics[self.rule.metric]
            # as the log has what JSON lacks
            self.values.append((step, math.nan if value is None else float(value)))

    @property
    def reason(self) -> str:
        """Why the run ends here; empty: it goes on."""
        return stop_reason(self.rule, self.values)


def early_stop(rule: StopConf, run_dir: Path, process: Process, resume: bool) -> EarlyStop:
    """Early stopping of a run, with the evaluations of its log where it is resumed. Collective."""
    found = EarlyStop(rule)
    if resume and process.rank == 0:
        for line in read_lines(run_dir / "metrics.jsonl", killed=True):
            found.see(line["step"], line)
    return EarlyStop(rule, process.from_rank0(found.values))
