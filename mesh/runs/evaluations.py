"""Results of every held-out prompt: written by an evaluation, read again, and compared.

A line of the file is a problem of a set: its question and answer, the responses with their scores,
and what it adds to each metric. Two files of the same questions are compared problem by problem:
resampling the problems of both together (a paired bootstrap) leaves the difference without what is
hard or easy about the problems themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.lifecycle.process import Process
from mesh.rl.estimators import Estimate, bootstrap, interval, mean_of
from mesh.roles.evaluation import Evaluation
from mesh.runs.lines import line_of, read_lines

Row = Mapping[str, Any]
FIELDS = ("set", "index", "question", "answer", "metrics")


def results_path(run_dir: Path, step: int) -> Path:
    """The results of a run's evaluation after `step` steps."""
    return run_dir / "evaluations" / f"step-{step}.jsonl"


def write_results(path: Path, evaluations: Mapping[str, Evaluation], process: Process) -> None:
    """Write the rows of all sets, in order, in place of an older file. Collective.

    Raises RuntimeError where the file cannot be written.
    """
    mine = [row for one in evaluations.values() for row in one.rows]
    shares = process.to_rank0(mine)
    if process.rank != 0:
        return
    order = list(evaluations)
    rows = [row for share in shares for row in share]
    rows.sort(key=lambda row: (order.index(row["set"]), place(row)))
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(f"{line_of(row)}\n" for row in rows))
        os.replace(partial, path)
    except OSError as error:
        raise RuntimeError(f"{path}: cannot be written ({error.strerror})") from error


def read_results(path: Path) -> list[Row]:
    """The rows of a file of results. Raises ValueError naming what it lacks."""
    rows: list[Row] = list(read_lines(path))
    if not rows:
        raise ValueError(f"{path}: has no line; name a file of results with problems in it")
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in FIELDS if name not in row]:
            wrong = f"line {number} has no {missing[0]}"
            remedy = "name a file that eval.results or log.evaluations wrote"
            raise ValueError(f"{path}: {wrong}; {remedy}")
    return rows


@dataclass(frozen=True)
class Compared:
    """A metric of two evaluations: the mean of each, and the second minus the first."""

    set: str
    metric: str
    a: Estimate
    b: Estimate
    difference: Estimate


def compare_results(a: Sequence[Row], b: Sequence[Row]) -> list[Compared]:
    """Every metric that both have, of every set. Raises ValueError where the questions differ."""
    refuse_other_questions(a, b)
    found = []
    for name in dict.fromkeys(row["set"] for row in a):
        sides = [sorted((r for r in rows if r["set"] == name), key=place) for rows in (a, b)]
        columns = [columns_of(side) for side in sides]
        metrics = [metric for metric in columns[0] if metric in columns[1]]
        for metric in metrics:
            one, other = (side[metric] for side in columns)
            means = bootstrap(one, other)
            values = mean_of(one), mean_of(other)
            ends = [interval(column) for column in (*means, means[1] - means[0])]
            estimates = zip((*values, values[1] - values[0]), ends, strict=True)
            found.append(Compared(name, metric, *(Estimate(x, *end) for x, end in estimates)))
    return found


def place(row: Row) -> int:
    """The place of a problem in its set."""
    return int(row["index"])


def columns_of(rows: Sequence[Row]) -> dict[str, list[list[float]]]:
    """By metric, the values of each problem; a part of a score may be missing from some."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {
        name: [[row["metrics"][name]] if name in row["metrics"] else [] for row in rows]
        for name in names
    }


def refuse_other_questions(a: Sequence[Row], b: Sequence[Row]) -> None:
    """Raise ValueError with the first problem that the two do not share."""
    sides = [{(r["set"], place(r)): (r["question"], r["answer"]) for r in rows} for rows in (a, b)]
    for side, rows in zip(sides, (a, b), strict=True):
        if len(side) < len(rows):
            raise ValueError(f"{len(rows)} lines have {len(side)} problems: one is there twice")
    names = [list(dict.fromkeys(r["set"] for r in rows)) for rows in (a, b)]
    if set(names[0]) != set(names[1]):
        raise ValueError(f"they have other sets: {shown(names[0])} and {shown(names[1])}")
    for name, index in sorted(sides[0].keys() | sides[1].keys()):
        one, other = (side.get((name, index)) for side in sides)
        if one != other:
            which = f"problem {index}" + (f" of the set {name}" if name else "")
            raise ValueError(
                f"they have other questions, so that nothing compares: {which} is "
                f"{'missing' if one is None else repr(one)} in the first, "
                f"{'missing' if other is None else repr(other)} in the second; evaluate both on "
                "the same task with the same seed and eval.num_prompts"
            )


def shown(names: Sequence[str]) -> str:
    """Names of sets; the run's own has none."""
    return ", ".join(name or "the run's own" for name in names)


def comparison_table(compared: Sequence[Compared]) -> list[str]:
    """A line for each metric: the mean of both and their difference, with intervals."""
    names = [f"{one.set}/{one.metric}".removeprefix("/") for one in compared]
    width = max([len("metric"), *map(len, names)])
    lines = [f"{'metric':<{width}}  {'A':<24}  {'B':<24}  {'B - A':<26}"]
    for name, one in zip(names, compared, strict=True):
        differs = one.difference.low > 0 or one.difference.high < 0
        columns = f"{written(one.a):<24}  {written(one.b):<24}  {written(one.difference, '+'):<26}"
        lines.append(f"{name:<{width}}  {columns}{' *' if differs else ''}".rstrip())
    return lines


def written(one: Estimate, sign: str = "") -> str:
    """`0.5137 [0.4902, 0.5371]`."""
    mean, low, high = (f"{x:{sign}.4f}" for x in (one.mean, one.low, one.high))
    return f"{mean} [{low}, {high}]"
