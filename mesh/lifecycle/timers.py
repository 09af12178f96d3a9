"""Seconds of each phase of a step, and the GPU memory in use at its end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mesh.lifecycle.heartbeat import heartbeat
from mesh.lifecycle.running import running


class Phases:
    """A stopwatch per phase: `with phases("generate"): ...`, then `phases.seconds()`.

    On CUDA a phase begins and ends by waiting for the device, so its seconds are its own.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._gpu_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._now()
        heartbeat()
        try:
            with running(name):
                yield
        finally:
            self._seconds[name] += self._now() - began
            if self._cuda:
                free, total = torch.cuda.mem_get_info()
                self._gpu_bytes[name] = total - free
            heartbeat()

    def seconds(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Seconds by phase since the last call. With a group: the slowest rank's (collective;
        every rank must have run the same phases)."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        if group is None or not taken:
            return taken
        return _largest(taken, group)

    def gpu_memory(self, group: dist.ProcessGroup) -> dict[str, float]:
        """`gpu_gb/<phase>`: memory in use of the fullest rank's GPU at the phase's last end, by
        whichever process [1e9 bytes]; empty without GPUs. Collective, as `seconds`.
        """
        used, self._gpu_bytes = self._gpu_bytes, {}
        largest = _largest(dict(used), group) if used else {}
        return {f"gpu_gb/{phase}": value / 1e9 for phase, value in largest.items()}

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _largest(values: dict[str, float], group: dist.ProcessGroup) -> dict[str, float]:
    """The largest of all ranks' values under each name."""
    largest = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(sorted(values), largest.tolist(), strict=True))


def phase_metrics(seconds: dict[str, float], tokens: dict[str, int]) -> dict[str, float]:
    """`seconds/<phase>` of every phase, and `tokens_per_second/<phase>` where tokens are given."""
    metrics = {f"seconds/{phase}": taken for phase, taken in seconds.items()}
    for phase, count in tokens.items():
        metrics[f"tokens_per_second/{phase}"] = count / max(seconds[phase], 1e-9)
    return metrics
