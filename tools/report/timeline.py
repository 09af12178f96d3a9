"""Who worked and who waited: the steps of timeline.jsonl that the page draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.report.reading import Line, Run
from tools.report.thinning import evenly, number

ROLES = ("trainer", "generator", "both")
STEPS = 60  # of one run that are drawn, where its steps have few events
EVENTS = 6000  # of one page
Event = tuple[str, float, float, float]


@dataclass(frozen=True)
class RankStep:
    """One rank in one step: events as (name, begin, end, wait), in seconds since it began."""

    rank: int
    role: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class TimelineStep:
    step: int
    ranks: tuple[RankStep, ...]

    @property
    def seconds(self) -> float:
        return max((event[2] for rank in self.ranks for event in rank.events), default=0.0)


def timeline_steps(run: Run) -> list[TimelineStep]:
    """The steps of timeline.jsonl that have the right form, one each, in order; says how many have
    not in `run.missing`."""
    found: dict[int, TimelineStep] = {}
    wrong = 0
    for line in run.timeline:
        ranks = tuple(ranks_of(line))
        if ranks:
            found[line["step"]] = TimelineStep(line["step"], ranks)
        else:
            wrong += 1
    if wrong:
        run.missing.append(f"timeline.jsonl: {wrong:,} lines name no ranks with events.")
    return [found[step] for step in sorted(found)]


def ranks_of(line: Line) -> Iterator[RankStep]:
    """The ranks of one line, in order."""
    listed = line.get("ranks")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("rank"), int):
            role = entry.get("role")
            events = entry.get("events")
            known = [event_of(event) for event in events] if isinstance(events, list) else []
            yield RankStep(
                entry["rank"],
                role if role in ROLES else "both",
                tuple(event for event in known if event is not None),
            )


def event_of(event: Any) -> Event | None:
    """An event of the right form; its wait may be left out."""
    if not isinstance(event, list) or len(event) < 3 or not isinstance(event[0], str):
        return None
    times = [number(value) for value in event[1:4]]
    if times[0] is None or times[1] is None or times[1] < times[0]:
        return None
    wait = times[2] if len(times) > 2 and times[2] is not None else 0.0
    return event[0][:40], times[0], times[1], min(max(wait, 0.0), times[1] - times[0])


def timeline_of(steps: list[TimelineStep], runs: int = 1) -> dict[str, Any]:
    """The timeline that is drawn: the first step, the last and evenly chosen ones."""
    each = max((sum(len(rank.events) for rank in step.ranks) for step in steps), default=1)
    kept = evenly(steps, max(2, min(STEPS, EVENTS // max(each * runs, 1))))
    roles = {rank.rank: rank.role for step in steps for rank in step.ranks}
    return {
        "ranks": [{"rank": rank, "role": roles[rank]} for rank in sorted(roles)],
        "steps": [drawn(step, sorted(roles)) for step in kept],
        "left_out": len(steps) - len(kept),
    }


def drawn(step: TimelineStep, ranks: list[int]) -> dict[str, Any]:
    """One step: the events of every rank, in the order of the ranks."""
    events = {rank.rank: rank.events for rank in step.ranks}
    return {
        "step": step.step,
        "seconds": round(step.seconds, 4),
        "ranks": [
            [[name, *(round(time, 4) for time in times)] for name, *times in events.get(rank, ())]
            for rank in ranks
        ],
    }
