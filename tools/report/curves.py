"""The curves of a run: every number of its metrics.jsonl, in the charts of charts.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tools.report.charts import GROUPS, MEMORY, RATES, Chart, chart_of
from tools.report.reading import Run
from tools.report.thinning import number, rounded, thinned

Series = dict[str, Any]
Points = Mapping[str, tuple[list[int], list[float | None]]]
SECONDS = "seconds/"
POINTS = 60_000  # of all curves of a page
MOST, FEWEST = 1000, 8  # points of one curve
DIGITS = 6


def points_of(run: Run) -> Points:
    """Steps and values of every number that was logged, by metric; not finite: None."""
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    for line in run.metrics:
        step = line["step"]
        for key, value in line.items():
            if key == "step" or isinstance(value, str | bool | list | dict):
                continue
            steps, values = found.setdefault(key, ([], []))
            steps.append(step)
            values.append(number(value))
    return found


def curves_of(points: Points, intervals: Mapping[str, Any], runs: int = 1) -> list[Series]:
    """The charts of what was computed; `intervals`: of evaluations, as `intervals_of` gives."""
    wanted = {name for name in points if not name.startswith(SECONDS)}
    return [c for c in charts(points, wanted, intervals, runs) if c["group"] not in (RATES, MEMORY)]


def speed_curves(points: Points, runs: int = 1) -> list[Series]:
    """The charts of rates and memory; a sync is one of them, the other phases are stacked."""
    wanted = {name for name in points if not name.startswith(SECONDS)} | {"seconds/sync"}
    found = charts(points, wanted & set(points), {}, runs)
    return [chart for chart in found if chart["group"] in (RATES, MEMORY)]


def charts(
    points: Points, wanted: Iterable[str], intervals: Mapping[str, Any], runs: int
) -> list[Series]:
    """Charts of the wanted metrics, in the order of their groups and then of charts.py."""
    found: dict[str, Series] = {}
    most = points_of_a_curve(len(points), runs)
    for name in sorted(wanted):
        chart, label = chart_of(name)
        entry = found.setdefault(chart.id, heading(chart))
        entry["series"].append(series(name, label, *points[name], most, intervals.get(name)))
    for entry in found.values():
        entry["series"].sort(key=lambda one: order_of(one["key"]))
    return sorted(found.values(), key=lambda one: (GROUPS.index(one["group"]), one["id"]))


def points_of_a_curve(curves: int, runs: int) -> int:
    """How many points a curve may have, so that all together stay within POINTS."""
    return min(MOST, max(FEWEST, POINTS // max(curves * runs, 1)))


def heading(chart: Chart) -> Series:
    """A chart without its lines."""
    return {
        "group": chart.group,
        "id": chart.id,
        "title": chart.title,
        "unit": chart.unit,
        "help": chart.help,
        "percent": chart.percent,
        "series": [],
    }


def series(
    name: str,
    label: str,
    steps: list[int],
    values: list[float | None],
    most: int,
    interval: Mapping[int, tuple[float, float]] | None,
) -> Series:
    """One line, thinned; low and high where its interval is known."""
    kept = thinned(values, most)
    line: Series = {
        "key": name,
        "label": label,
        "steps": [steps[i] for i in kept],
        "values": [short(values[i]) for i in kept],
    }
    if interval:
        ends = [interval.get(steps[i]) for i in kept]
        line["low"] = [short(end[0]) if end else None for end in ends]
        line["high"] = [short(end[1]) if end else None for end in ends]
    return line


def short(value: float | None) -> float | int | None:
    """A value with as many digits as a screen can show."""
    return None if value is None else rounded(value, DIGITS)


def order_of(name: str) -> tuple[bool, bool, str]:
    """Means before others, sampled before greedy."""
    return "mean" not in name, "max" in name, name


def phases_of(points: Points) -> dict[str, Any]:
    """Seconds of every phase at each step, the slowest rank's; a phase that a step lacks is 0."""
    names = [name for name in points if name.startswith(SECONDS)]
    by_step: dict[int, dict[str, float]] = {}
    for name in names:
        for step, value in zip(*points[name], strict=True):
            by_step.setdefault(step, {})[name.removeprefix(SECONDS)] = value or 0.0
    all_steps = sorted(by_step)
    totals = [sum(by_step[step].values()) for step in all_steps]
    steps = [all_steps[i] for i in thinned(totals, MOST // 2)]
    labels = sorted({name.removeprefix(SECONDS) for name in names}, key=phase_order)
    seconds = {
        label: [rounded(by_step[step].get(label, 0.0), 4) for step in steps] for label in labels
    }
    return {"steps": steps, "names": labels, "seconds": seconds}


PHASES = ("generate", "exchange", "train", "sync", "eval", "checkpoint", "log")


def phase_order(name: str) -> tuple[int, str]:
    """Phases in the order of a step."""
    return PHASES.index(name) if name in PHASES else len(PHASES), name
