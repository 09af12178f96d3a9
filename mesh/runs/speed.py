"""The metrics of a step's speed and memory, of what its ranks measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mesh.lifecycle.timers import Measured

TOKENS = {"generate": "tokens/generated", "train": "tokens/trained"}
"""By phase, the metric that counts its tokens."""

FLOPS, PEAK = "flops", "peak_flops"
SYNC_GB, SYNC_SECONDS = "sync/gb", "sync/seconds"
HOST_GB, GPU_GB = "host_gb", "gpu_gb/"


def speed_metrics(measured: Measured, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase, the slowest rank's; tokens per second; the fullest rank's memory; the
    sync's bytes and rate; the share of the GPUs' peak that training reached. `metrics`: of the
    step."""
    seconds, gauges = measured.seconds(), measured.gauges
    counts = {p: int(metrics.get(name, 0)) for p, name in TOKENS.items() if p in seconds}
    memory = {
        name: max(values)
        for name, values in gauges.items()
        if name == HOST_GB or name.startswith(GPU_GB)
    }
    return {
        **phase_metrics(seconds, counts),
        **memory,
        **sync_metrics(measured),
        **mfu_metrics(measured, seconds.get("train", 0.0)),
    }


def phase_metrics(seconds: Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
    """`seconds/<phase>` of every phase, and `tokens_per_second/<phase>` where tokens are given."""
    metrics = {f"seconds/{phase}": taken for phase, taken in seconds.items()}
    for phase, count in tokens.items():
        metrics[f"tokens_per_second/{phase}"] = count / max(seconds[phase], 1e-9)
    return metrics


def sync_metrics(measured: Measured) -> dict[str, float]:
    """Bytes that the step's sync moved [1e9], and their rate, from when all ranks were ready for it
    until the last one had what it gets; no rate where weights are shared and nothing moves."""
    if SYNC_GB not in measured.gauges:
        return {}
    moved, event = measured.gauges[SYNC_GB][0], measured.names.index("sync")
    waits_R = [waits_E[event] for waits_E in measured.waits()]
    taken = zip(measured.gauges[SYNC_SECONDS], waits_R, strict=True)
    longest = max(seconds - waited for seconds, waited in taken)
    rate = {"sync/gb_per_second": moved / longest} if moved and longest > 0 else {}
    return {SYNC_GB: moved, **rate}


def mfu_metrics(measured: Measured, seconds: float) -> dict[str, float]:
    """`mfu/train`: operations that training asks for over those that its GPUs could have done in
    the phase; nothing where a peak is unknown, or nothing was trained."""
    peak = math.fsum(measured.gauges.get(PEAK, ()))
    done = math.fsum(measured.gauges.get(FLOPS, ()))
    return {"mfu/train": done / (seconds * peak)} if peak > 0 and done > 0 and seconds > 0 else {}
