"""When each phase of a step began and ended on every rank, and how much memory was in use.

The ranks' times are gathered once per logged step. From them follows who waited for whom: a rank
that needs others in a phase waits until the last of them has begun it too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import record_function

from mesh.lifecycle.heartbeat import heartbeat
from mesh.lifecycle.running import running

PHASES = ("generate", "exchange", "train", "sync", "eval", "checkpoint", "log")
"""Names of the phases of a step."""

Meeting = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Pairs (ranks that wait, ranks that they wait for): the first cannot get through a phase before
the others have begun it."""


@dataclass(frozen=True)
class Measured:
    """What all ranks R measured in the E phases since the last time, in the order in which they
    were run; a phase that was run several times is listed as often.

    times_RE: (begin, end) by the clock [unix seconds]; meetings: of each phase, () where ranks do
    not wait for each other, or it is not known; gauges: other numbers, one of each rank.
    """

    names: Sequence[str]
    meetings: Sequence[Meeting]
    times_RE: Sequence[Sequence[tuple[float, float]]]
    gauges: Mapping[str, Sequence[float]]

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, the slowest rank's."""
        longest = dict.fromkeys(self.names, 0.0)
        for times_E in self.times_RE:
            taken = dict.fromkeys(self.names, 0.0)
            for name, (begin, end) in zip(self.names, times_E, strict=True):
                taken[name] += end - begin
            longest = {name: max(longest[name], seconds) for name, seconds in taken.items()}
        return longest

    def waits(self) -> list[list[float]]:
        """Seconds, of R ranks and E phases, that a rank waited in a phase until the last rank that
        it needed there was ready; 0 where it needed none, or it is not known."""
        waits_RE = [[0.0] * len(self.names) for _ in self.times_RE]
        for event, meeting in enumerate(self.meetings):
            for waiting, awaited in meeting:
                ready = max(self.times_RE[rank][event][0] for rank in awaited)
                for rank in waiting:
                    begin, end = self.times_RE[rank][event]
                    waits_RE[rank][event] = max(min(ready, end) - begin, 0.0)
        return waits_RE


class Phases:
    """A stopwatch per phase: `with phases("generate"): ...`, then `phases.measured(group)`.

    On CUDA a phase begins and ends by waiting for the device, so its seconds are its own. A trace
    of a profiler has the phases as ranges of their names.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._origin = time.time() - time.perf_counter()
        self._events: list[tuple[str, Meeting, float, float]] = []
        self._gauges: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, meeting: Meeting = (), host: bool = False) -> Iterator[None]:
        """Time a phase. meeting: who waits for whom in it; host: it leaves the device alone, which
        is not waited for."""
        began = self._now(host)
        heartbeat()
        try:
            with running(name), record_function(name):
                yield
        finally:
            self._events.append((name, meeting, began, self._now(host)))
            if self._cuda and not host:
                free, total = torch.cuda.mem_get_info()
                self._gauges[f"gpu_gb/{name}"] = (total - free) / 1e9
            heartbeat()

    def gauge(self, name: str, value: float) -> None:
        """Have this rank's `value` gathered with the times; every rank gives one."""
        self._gauges[name] = value

    def seconds(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Seconds by phase since the last call, the slowest rank's; without a group, this rank's.
        As `measured`."""
        return self.measured(group).seconds()

    def measured(self, group: dist.ProcessGroup | None = None) -> Measured:
        """What the ranks of the group measured since the last call; None: this one. Collective;
        every rank must have run the same phases."""
        events, self._events = self._events, []
        gauges, self._gauges = self._gauges, {}
        names = sorted(gauges)
        times = [self._origin + moment for event in events for moment in event[2:]]
        mine = torch.tensor([*times, *(gauges[name] for name in names)], dtype=torch.float64)
        table_R = [row.tolist() for row in _of_all_ranks(mine, group)]
        return Measured(
            [event[0] for event in events],
            [event[1] for event in events],
            [[(row[2 * e], row[2 * e + 1]) for e in range(len(events))] for row in table_R],
            {name: [row[len(times) + i] for row in table_R] for i, name in enumerate(names)},
        )

    def _now(self, host: bool) -> float:
        if self._cuda and not host:
            torch.cuda.synchronize()
        return time.perf_counter()


class Stopwatch:
    """Seconds from its construction to `stop`; on CUDA those of the device's stream, which is not
    waited for: synchronise before `seconds` is called."""

    def __init__(self, device: torch.device):
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._begun = self._ended = time.perf_counter()

    def stop(self) -> None:
        if self._events:
            self._events[1].record()
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        if self._events:
            begun, ended = self._events
            return float(begun.elapsed_time(ended)) / 1e3
        return self._ended - self._begun


def _of_all_ranks(mine: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    if group is None or not mine.numel():
        return [mine]
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return found
