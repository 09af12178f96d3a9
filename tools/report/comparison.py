"""What differs between several runs: configuration, machine, results, and the first step at which
their metrics do, by the same rule as tools/compare_runs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh.runs.compare import FieldDifference, line_differences
from tools.report.curves import Points
from tools.report.headline import WALL_TIME, show, values_of
from tools.report.intervals import Intervals, intervals_of
from tools.report.reading import Run
from tools.report.settings import clipped, entries

Data = dict[str, Any]
ABSENT = "(none)"
IGNORED = ("run_dir", "resume")
MACHINE = ("Commit", "Python", "CUDA", "CPU", "CPU cores", "Ranks", "Packages", "Variables")
RATES = "tokens_per_second/"
LEFT_OUT = "times, rates and memory are not compared"


def comparison_of(runs: Sequence[Run], points: Sequence[Points], shown: Sequence[Data]) -> Data:
    """The comparison of two runs or more. shown: what the page has of each."""
    first = first_difference(runs)
    return {
        "config": config_rows(runs, shown),
        "results": result_rows(runs, points, shown),
        "first_difference": first,
        "text": sentence(runs, first),
    }


def config_rows(runs: Sequence[Run], shown: Sequence[Data]) -> list[Data]:
    """Keys, and entries of the environment, whose values are not the same in all runs."""
    tables = [{row["key"]: row["value"] for row in data["config"]} for data in shown]
    machines = [machine_of(run) for run in runs]
    known = {row["key"]: row["default"] for data in shown for row in data["config"]}
    rows = differing([key for key in joined(tables) if key not in IGNORED], tables, known)
    names = [name for name in joined(machines) if name in MACHINE]
    return rows + differing(names, machines, {})


def machine_of(run: Run) -> dict[str, str]:
    """Entries of the environment by label; all values of a run whose starts differ."""
    found: dict[str, list[str]] = {}
    for environment in run.environments:
        for label, value in entries(environment):
            if value not in found.setdefault(label, []):
                found[label].append(value)
    return {label: clipped("; then ".join(values)) for label, values in found.items()}


def differing(
    keys: Sequence[str], tables: Sequence[dict[str, str]], defaults: dict[str, str]
) -> list[Data]:
    """Rows of the keys whose values differ; a run whose version lacks a key has the default."""
    rows = []
    for key in keys:
        if len({plain(table.get(key, defaults.get(key, ABSENT))) for table in tables}) > 1:
            rows.append({"key": key, "values": [table.get(key, ABSENT) for table in tables]})
    return rows


def plain(value: str) -> str:
    """A number in one spelling: 1.0e-06 is 1e-06."""
    try:
        return str(float(value))
    except ValueError:
        return value


def joined(tables: Sequence[dict[str, str]]) -> list[str]:
    """The keys of all tables, each once, in order."""
    return [*dict.fromkeys(key for table in tables for key in table)]


def result_rows(runs: Sequence[Run], points: Sequence[Points], shown: Sequence[Data]) -> list[Data]:
    """Steps, the last value of every evaluation metric with its interval, the last rewards, time
    and rates, as far as one of the runs has them."""
    intervals = [intervals_of(run, held) for run, held in zip(runs, points, strict=True)]
    names = sorted({n for held in points for n in held if n.startswith("eval/")})
    both = list(zip(points, intervals, strict=True))
    rows = [("steps", [f"{run.steps:,}" for run in runs])]
    rows += [(name, [last_of(held, name, ends) for held, ends in both]) for name in names]
    rows += [("reward/mean, last 10 steps", [mean_of(held, "reward/mean", 10) for held in points])]
    rows += [("wall time", [fact_of(data, WALL_TIME) for data in shown])]
    for name in sorted({n for held in points for n in held if n.startswith(RATES)}):
        rows.append((name, [median_of(held, name) for held in points]))
    return [{"label": label, "values": values} for label, values in rows]


def last_of(points: Points, name: str, intervals: Intervals) -> str:
    """The last value, with its interval if it is known."""
    steps, values = points.get(name, ([], []))
    known = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    if not known:
        return ABSENT
    step, value = known[-1]
    ends = intervals.get(name, {}).get(step)
    return show(value) + (f" [{show(ends[0])}, {show(ends[1])}]" if ends else "")


def mean_of(points: Points, name: str, count: int) -> str:
    known = values_of(points, name)[-count:]
    return show(sum(known) / len(known)) if known else ABSENT


def median_of(points: Points, name: str) -> str:
    known = sorted(values_of(points, name))
    return f"{known[len(known) // 2]:,.0f}" if known else ABSENT


def fact_of(data: Data, label: str) -> str:
    """A fact of a run's headline."""
    facts = data["headline"]["facts"]
    return next((str(fact["value"]) for fact in facts if fact["label"] == label), ABSENT)


def first_difference(runs: Sequence[Run]) -> Data | None:
    """The first step and metric in which a run differs from the first one; timings are left out."""
    found: list[tuple[float, FieldDifference, Run]] = []
    for other in runs[1:]:
        pair = line_differences("metrics.jsonl", runs[0].metrics, other.metrics)
        if (one := next(pair, None)) is not None:
            found.append((step_of(one), one, other))
    if not found:
        return None
    step, one, other = min(found, key=lambda entry: entry[0])
    if one.key == "line":
        both = (runs[0], other) if len(runs[0].metrics) < len(other.metrics) else (other, runs[0])
        ended, longer = (f"run {runs.index(run) + 1}" for run in both)
        text = f"{ended} ends before step {step:.0f}, which {longer} has"
        return {"step": int(step), "metric": "", "values": [], "text": f"{text}."}
    values = [value_at(run, int(step), one.key) for run in runs]
    text = f"{one.key} of step {step:.0f} is the first that differs"
    return {"step": int(step), "metric": one.key, "values": values, "text": f"{text}."}


def step_of(difference: FieldDifference) -> float:
    """The step of a difference; where one run has no line more, that of the other's line."""
    names = [difference.line, str(difference.a), str(difference.b)]
    found = next((name for name in names if name.startswith("step ")), "step 0")
    return float(found.split()[1])


def value_at(run: Run, step: int, metric: str) -> str:
    """A logged value with all its digits."""
    line = next((line for line in run.metrics if line["step"] == step), {})
    return str(line.get(metric, ABSENT))


def sentence(runs: Sequence[Run], first: Data | None) -> str:
    """The comparison in one sentence."""
    if first is None:
        count = min(len(run.metrics) for run in runs)
        which = "Both runs" if len(runs) == 2 else f"All {len(runs)} runs"
        return f"{which} have equal metrics, to the bit, in all {count:,} lines; {LEFT_OUT}."
    if first["metric"] and first["step"] == min(line["step"] for line in runs[0].metrics):
        return f"The metrics differ from their first line on: {first['text']}"
    if first["metric"]:
        return f"The metrics are equal to the bit before step {first['step']}; {first['text']}"
    return f"The metrics are equal to the bit as far as the shorter run goes: {first['text']}"
