"""Seconds of each phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mesh.pulse import beat


class Phases:
    """A stopwatch per phase: `with phases("generate"): ...`, then `phases.seconds()`.

    On CUDA a phase begins and ends by waiting for the device, so its seconds are its own.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._now()
        beat()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - began
            beat()

    def seconds(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Seconds by phase since the last call. With a group: the slowest rank's (collective;
        every rank must have run the same phases)."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        if group is None or not taken:
            return taken
        slowest = torch.tensor([taken[name] for name in sorted(taken)], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        return dict(zip(sorted(taken), slowest.tolist(), strict=True))

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def phase_metrics(seconds: dict[str, float], tokens: dict[str, int]) -> dict[str, float]:
    """`seconds/<phase>` of every phase, and `tokens_per_second/<phase>` where tokens are given."""
    metrics = {f"seconds/{phase}": taken for phase, taken in seconds.items()}
    for phase, count in tokens.items():
        metrics[f"tokens_per_second/{phase}"] = count / max(seconds[phase], 1e-9)
    return metrics
