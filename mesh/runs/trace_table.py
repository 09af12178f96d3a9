"""A short table of a profiler's trace: what took the time of a step, by phase, CPU and GPU.

Reads Chrome's trace events as torch writes them: complete events (`ph` X) with a category, a
thread, a start and a duration in microseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RANGE = "user_annotation"
ON_CPU = ("cpu_op", RANGE, "cuda_runtime", "cuda_driver")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
BETWEEN = "between phases"
OWN = "Python, and what is not traced"
TOP, NAME_WIDTH = 10, 90

Event = Mapping[str, Any]


@dataclass
class PhaseTime:
    """What took the time of all occurrences of a phase [s]. wall: from their begin to their end;
    cpu, gpu: (seconds, calls) of each operation, without those that it called; busy: in which a
    kernel ran on the GPU."""

    wall: float = 0.0
    times: int = 0
    busy: float = 0.0
    cpu: dict[str, tuple[float, int]] = field(default_factory=dict)
    gpu: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, side: str, name: str, seconds: float) -> None:
        table = self.cpu if side == "cpu" else self.gpu
        before, calls = table.get(name, (0.0, 0))
        table[name] = before + seconds, calls + 1


def phase_times(events: Iterable[Event], phases: Sequence[str]) -> dict[str, PhaseTime]:
    """The time of each phase, in order; `phases`: the names of the ranges that are phases, which
    are not nested. An operation belongs to the phase in which it began, on whatever thread."""
    done = [event for event in events if event.get("ph") == "X"]
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in done
        if event.get("cat") == RANGE and event["name"] in phases
    )
    found: defaultdict[str, PhaseTime] = defaultdict(PhaseTime)
    for begin, end, name in spans:
        found[name].wall += (end - begin) / 1e6
        found[name].times += 1
    kernels = [event for event in done if event.get("cat") in ON_GPU]
    for event, own in self_times([event for event in done if event.get("cat") in ON_CPU]):
        name = event["name"]
        label = OWN if event["cat"] == RANGE and name in phases else name
        found[_phase_at(event["ts"], spans)].add("cpu", label, own / 1e6)
    for event in kernels:
        found[_phase_at(event["ts"], spans)].add("gpu", event["name"], event["dur"] / 1e6)
    for begin, end in _united(kernels):
        found[_phase_at(begin, spans)].busy += (end - begin) / 1e6
    return dict(found)


def self_times(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Each event with its duration less that of the events directly within it on its thread."""
    threads: defaultdict[tuple[Any, Any], list[Event]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for mine in threads.values():
        open_: list[tuple[Event, float, float]] = []  # event, end, duration of those within
        for event in sorted(mine, key=lambda e: (e["ts"], -e["dur"])):
            while open_ and open_[-1][1] <= event["ts"]:
                yield _closed(open_)
            open_.append((event, event["ts"] + event["dur"], 0.0))
        while open_:
            yield _closed(open_)


def _closed(open_: list[tuple[Event, float, float]]) -> tuple[Event, float]:
    event, _, within = open_.pop()
    if open_:
        parent, end, others = open_[-1]
        open_[-1] = parent, end, others + event["dur"]
    return event, max(event["dur"] - within, 0.0)


def _phase_at(moment: float, spans: Sequence[tuple[float, float, str]]) -> str:
    place = bisect_right(spans, moment, key=lambda span: span[0]) - 1
    return spans[place][2] if place >= 0 and moment < spans[place][1] else BETWEEN


def _united(events: Iterable[Event]) -> list[tuple[float, float]]:
    """The spans in which at least one of the events runs."""
    spans: list[tuple[float, float]] = []
    for begin, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        if spans and begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((begin, end))
    return spans


def table_of(title: str, times: Mapping[str, PhaseTime]) -> str:
    """The phases, then the operations of each that took longest by themselves."""
    gpu = any(time.gpu for time in times.values())
    lines = [title, "", f"{'phase':<16}{'times':>6}{'wall s':>10}" + f"{'GPU busy':>10}" * gpu]
    for name, time in times.items():
        busy = f"{time.busy / time.wall:>10.0%}" if gpu and time.wall else ""
        wall = f"{time.times:>6}{time.wall:>10.4f}" if time.times else ""
        lines.append(f"{name:<16}{wall}{busy}".rstrip())
    for name, time in times.items():
        for side, table in (("CPU", time.cpu), ("GPU", time.gpu)):
            lines += _operations(f"{name}, {side}", table)
    return "\n".join(lines) + "\n"


def _operations(title: str, table: Mapping[str, tuple[float, int]]) -> list[str]:
    if not table:
        return []
    whole = sum(seconds for seconds, _ in table.values())
    ordered = sorted(table.items(), key=lambda item: -item[1][0])
    rows = [(name[:NAME_WIDTH], *found) for name, found in ordered[:TOP]]
    if rest := [found for _, found in ordered[TOP:]]:
        seconds, calls = (sum(column) for column in zip(*rest, strict=True))
        rows.append((f"{len(rest)} others", seconds, calls))
    return ["", f"{title}: {whole:.4f} s", f"{'self s':>10}{'share':>7}{'calls':>8}  operation"] + [
        f"{seconds:>10.4f}{seconds / max(whole, 1e-12):>7.1%}{calls:>8}  {name}"
        for name, seconds, calls in rows
    ]
