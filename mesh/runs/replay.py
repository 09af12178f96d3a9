"""Comparison of a replayed step with its lines in the logs, field by field, as tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.config.keys import problem
from mesh.runs.compare import NOTHING, different, untimed
from mesh.runs.lines import line_of, read_lines
from mesh.runs.samples import group_of, read_samples, without_nulls

Record = dict[str, Any]
LAYOUT = (
    *("mesh.mode", "waves", "trainer.dp_", "trainer.tp", "trainer.sequence_parallel"),
    *("generator.dp", "generator.tp"),
)
FIELDS = ("prompt", "response", "answer", "reward", "advantage", "finish_reason")
MAX_CELL = 40  # characters in a table cell


@dataclass(frozen=True)
class LoggedStep:
    """One step as logged: metrics without timings, samples in order."""

    metrics: Record
    samples: list[Record]

    @property
    def evaluated(self) -> bool:
        return any(key.startswith("eval/") for key in self.metrics)


def logged_step(run_dir: Path, step: int) -> LoggedStep:
    """Read one step of a run's logs. Raises ValueError if it has no such step."""
    lines = read_lines(run_dir / "metrics.jsonl", killed=True)
    samples = read_samples(run_dir, killed=True)
    taken = {line["step"]: line for line in lines if line["step"] > 0}
    if step not in taken:
        has = f"steps {min(taken)} to {max(taken)}" if taken else "no step"
        remedy = "choose a step that it has logged"
        raise ValueError(problem("step", step, f"{run_dir} has logged {has}", remedy))
    mine = [_made(sample) for sample in samples if sample["step"] == step]
    return LoggedStep(_without_step(untimed(taken[step])), mine)


def as_logged(metrics: Record, samples: Sequence[Record]) -> LoggedStep:
    """Convert a step just taken to what its logs would contain."""
    back = [json.loads(line_of(record)) for record in (metrics, *samples)]
    return LoggedStep(untimed(back[0]), [_made(without_nulls(sample)) for sample in back[1:]])


def _made(sample: Record) -> Record:
    """A sample without why it was kept: a replay makes all, whatever is left out of the file."""
    return {key: value for key, value in sample.items() if key not in ("step", "chosen")}


def _without_step(line: Record) -> Record:
    return {key: value for key, value in line.items() if key != "step"}


@dataclass(frozen=True)
class ReplayComparison:
    """A logged step and its replay. Samples that were not logged are not compared."""

    logged: LoggedStep
    again: LoggedStep

    @property
    def wrong_metrics(self) -> list[str]:
        return different(self.logged.metrics, self.again.metrics)

    def pairs(self) -> Iterator[tuple[Record, Record, list[str]]]:
        """Each logged sample, its replay, and the fields that differ."""
        replayed = {_id(sample): sample for sample in self.again.samples}
        for sample in self.logged.samples:
            twin = replayed.get(_id(sample), {})
            old = "prompt_text" not in sample  # its lines had fewer fields, in another form
            sides = [_only(FIELDS, one) if old else one for one in (sample, twin)]
            yield sample, twin, different(*sides)

    @property
    def wrong_samples(self) -> int:
        return sum(bool(wrong) for _, _, wrong in self.pairs())

    @property
    def equal(self) -> bool:
        return not self.wrong_metrics and not self.wrong_samples

    def sample_table(self, shown: int) -> list[str]:
        """The first `shown` samples (-1: all) and those that differ, with their replays."""
        rows: list[list[str]] = [[*FIELDS, ""]]
        for number, (sample, twin, wrong) in enumerate(self.pairs()):
            if not wrong and 0 <= shown <= number:
                continue
            result = f"differs: {', '.join(wrong)}" if wrong else "equal"
            rows.append([*(_text(sample, field) for field in FIELDS), result])
            if wrong:
                rows.append([*(_text(twin, field) for field in FIELDS), "(replay)"])
        return columns(rows)

    def metric_table(self) -> list[str]:
        """Every metric, as logged and as replayed."""
        wrong, rows = self.wrong_metrics, [["metric", "logged", "replayed", ""]]
        for key in sorted(self.logged.metrics | self.again.metrics):
            values = [_text(step.metrics, key) for step in (self.logged, self.again)]
            rows.append([key, *values, "differs" if key in wrong else "equal"])
        return columns(rows)

    def verdict(self) -> str:
        """Summary line."""
        metrics, samples = self.logged.metrics, self.logged.samples
        if self.equal:
            return f"equal to the bit: {len(metrics)} metrics, {len(samples)} samples"
        names = ", ".join(self.wrong_metrics) or "no metric"
        return f"DIFFERENT: {names}; {self.wrong_samples} of {len(samples)} samples"


def _only(fields: Sequence[str], sample: Record) -> Record:
    return {key: sample[key] for key in fields if key in sample}


def _id(sample: Record) -> tuple[Any, ...]:
    return *group_of(sample), sample["sample_id"]


def _text(record: Record, key: str) -> str:
    text = json.dumps(record[key], ensure_ascii=False) if key in record else NOTHING
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def columns(rows: list[list[str]]) -> list[str]:
    """Format rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def cautions(run_dir: Path, exact: bool, overrides: Sequence[str], num_ranks: int) -> list[str]:
    """Legitimate reasons for bits to differ: no batch invariance, or starts of the run on another
    number of ranks or in another layout than this one, given by `overrides`."""
    found = [] if exact else ["batch_invariant=false: equal bits are not guaranteed"]
    ours = (num_ranks, layout_overrides(overrides))
    for start in sorted(set(starts(run_dir)) - {ours}):
        was, here = (" ".join([f"{ranks} ranks", *layout]) for ranks, layout in (start, ours))
        found.append(f"the run used {was}, this replay uses {here}: bits may differ")
    return found


def starts(run_dir: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(number of ranks, overrides of the layout) of each start of a run."""
    found = []
    for path in run_dir.glob("environment*.json"):
        environment = json.loads(path.read_text())
        resumed = path.name != "environment.json"
        arguments = shlex.split(environment["command"]) if resumed else []
        found.append((environment["world_size"], layout_overrides(arguments)))
    return found


def layout_overrides(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command-line arguments that set the mesh of a role."""
    return tuple(sorted(argument for argument in arguments if argument.startswith(LAYOUT)))
