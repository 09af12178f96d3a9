"""The metrics of a step with several updates, from those of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, isfinite

Metrics = Mapping[str, float]

BY_UPDATE = ("loss", "grad_norm")
"""Means over updates; what is named nowhere here is a mean over tokens."""

LARGEST, COUNTED, LAST = ("ratio/max",), ("tokens/trained", "skipped"), ("steps_without_signal",)
FIRST = ("logprob_diff/max", "logprob_diff/mean", "lr")
SHOWN = ("loss", "grad_norm", "clip_fraction", "ratio/max", "ratio/mean", "approx_kl")


def step_metrics(updates: Sequence[Metrics]) -> dict[str, float]:
    """The metrics of a step from those of its updates, in order; with one, that one's.

    An update that was left out has no `grad_norm`: it is listed, and counts in nothing else. All
    means are exactly rounded. `logprob_diff/*` are of all tokens before the first update.
    """
    made = [update for update in updates if "grad_norm" in update]
    if not made:
        return {}  # off the trainer
    metrics = dict(made[0])
    if len(updates) > 1:
        metrics |= _merged(made) | {"updates": float(len(made))}
        for number, update in enumerate(updates, 1):
            metrics |= {f"update/{number}/{key}": update[key] for key in SHOWN if key in update}
    del metrics["approx_kl"]
    return metrics


def _merged(made: Sequence[Metrics]) -> dict[str, float]:
    return {name: _one(name, made) for name in dict.fromkeys(key for one in made for key in one)}


def _one(name: str, made: Sequence[Metrics]) -> float:
    """One metric; an update without tokens may not have measured it."""
    having = [update for update in made if name in update]
    values = [update[name] for update in having]
    if name in FIRST or name in LAST:
        return values[0] if name in FIRST else values[-1]
    if name in LARGEST:
        return max(values)
    if name in COUNTED:
        return total(values)
    weights = [1.0 if name in BY_UPDATE else update["tokens/trained"] for update in having]
    summed = total([value * weight for value, weight in zip(values, weights, strict=True)])
    return summed / max(fsum(weights), 1.0)


def total(values: Sequence[float]) -> float:
    """The sum, exactly rounded; values of a skipped update may be infinite, where fsum raises."""
    return fsum(values) if all(map(isfinite, values)) else sum(values)
