"""Findings about ranks: one that is slow, a role that waits for the other."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tools.report.findings import INFO, WARN, Evidence, Finding
from tools.report.signals import Signal
from tools.report.timeline import TimelineStep

SLOW, OF_STEP, SLOW_STEPS = 1.25, 0.05, 10


def slow_rank(evidence: Evidence) -> Iterator[Finding]:
    """A rank that works a quarter longer in a phase than the median of the ranks that run it, by
    more than a twentieth of the step, waits left out; the longest such streak of steps."""
    for name in DOES:
        excess: dict[int, dict[int, float]] = defaultdict(dict)
        for step in usual(evidence.timeline):
            if found := slowest(step, name):
                excess[found[0]][step.step] = found[1]
        for rank, by_step in sorted(excess.items()):
            steps = [step.step for step in usual(evidence.timeline)]
            seen = Signal((*steps,), tuple(by_step.get(step, 0.0) for step in steps))
            if span := lasting(seen, 0.0):
                yield slow(evidence, name, rank, span)
                return


def usual(timeline: Sequence[TimelineStep]) -> Sequence[TimelineStep]:
    """The steps but the first, which warms up."""
    return timeline[1:] or timeline


def lasting(signal: Signal, limit: float) -> tuple[int, int] | None:
    """The longest streak of at least SLOW_STEPS steps, or all there are, in which the running
    median is above a limit."""
    smooth = signal.smooth() if len(signal.steps) >= 2 * SLOW_STEPS else signal
    return smooth.streak(lambda value: value > limit, max(1, min(SLOW_STEPS, len(signal.steps))))


def slowest(step: TimelineStep, name: str) -> tuple[int, float] | None:
    """The rank that is slow in a phase of a step, and by how many seconds; None: none is."""
    ranks = busy([step]).get(name, {})
    if len(ranks) < 2:
        return None
    rank, most = max(ranks.items(), key=lambda item: item[1])
    more = most - (others := median_of_others(ranks, rank))
    return (rank, more) if most > SLOW * others and more > OF_STEP * step.seconds else None


def median_of_others(ranks: Mapping[int, float], rank: int) -> float:
    return statistics.median(v for other, v in ranks.items() if other != rank)


def slow(evidence: Evidence, name: str, rank: int, span: tuple[int, int]) -> Finding:
    """The finding about a rank that is slow in a phase from one step to another."""
    inside = [step for step in evidence.timeline if span[0] <= step.step <= span[1]]
    ranks = busy(inside)[name]
    mine, others = (v / len(inside) for v in (ranks[rank], median_of_others(ranks, rank)))
    return Finding(
        WARN, f"Rank {rank} is slow", span[0],
        f"From step {span[0]} to {span[1]} it works {mine:.3g} s a step in the phase {name}, the "
        f"median of the others is {others:.3g} s, so they wait for it.",
        "Compare its machine with the others: clocks, other processes, OMP_NUM_THREADS; "
        "profile.steps=[3] shows what takes the time; with a larger num_prompts long "
        "responses even out between ranks.",
    )  # fmt: skip


DOES = {"generate": ("generator", "both"), "train": ("trainer", "both")}


def busy(steps: Sequence[TimelineStep]) -> Mapping[str, dict[int, float]]:
    """Seconds of work by phase and rank, without what the rank waited; of the ranks whose role
    has work in the phase, which all ranks pass through."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for step in steps:
        for rank in step.ranks:
            for name, begin, end, wait in rank.events:
                work = end - begin - wait
                if rank.role in DOES.get(name, ()):
                    found[name][rank.rank] = found[name].get(rank.rank, 0.0) + work
    return {name: {r: v for r, v in ranks.items() if v > 0} for name, ranks in found.items()}


WAITS, WAITS_LONG = 0.3, 0.6
TAKE_TURNS = (
    "The roles take turns, so more ranks for one of them would help little: with more waves the "
    "trainer works on one part while the next is generated; mesh.mode=colocated lets both use all "
    "ranks."
)


def waiting(evidence: Evidence) -> Iterator[Finding]:
    """A role of a split run that waits for the other more than 30% of the time; the longest such
    streak of steps."""
    steps = usual(evidence.timeline)
    found = []
    for role, other, remedy in (
        ("trainer", "generator", "Give the generator more ranks (trainer.dp_shard smaller), or "
         "waves=2, with which the trainer works on one part while the next is generated."),
        ("generator", "trainer", "Give the trainer more ranks, a larger "
         "trainer.microbatch_tokens, or mesh.mode=colocated, where both use all ranks."),
    ):  # fmt: skip
        shares = {step.step: share for step in steps if (share := waited(step, role)) is not None}
        if span := lasting(Signal((*shares,), (*shares.values(),)), WAITS):
            inside = [share for step, share in shares.items() if span[0] <= step <= span[1]]
            mean = statistics.fmean(inside)
            found.append(Finding(
                WARN if mean > WAITS_LONG else INFO, f"The {role} waits for the {other}", span[0],
                f"From step {span[0]} to {span[1]} the {role}'s ranks spend {mean:.0%} of their "
                "time waiting for other ranks.",
                remedy,
            ))  # fmt: skip
    yield from found if len(found) == 1 else (replace(one, remedy=TAKE_TURNS) for one in found)


def waited(step: TimelineStep, role: str) -> float | None:
    """The share of a step that the ranks of a role waited; None where there are none."""
    waits = [sum(event[3] for event in rank.events) for rank in step.ranks if rank.role == role]
    return statistics.fmean(waits) / step.seconds if waits and step.seconds else None
