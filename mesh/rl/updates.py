"""The metrics of a step with several updates, from those of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum

Metrics = Mapping[str, float]

BY_TOKEN = ("entropy", "kl", "clip_fraction", "ratio/mean")
"""Means over tokens; those of `BY_UPDATE` are means over updates."""

BY_UPDATE = ("loss", "grad_norm")
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
    tokens = [update["tokens/trained"] for update in made]
    weights = dict.fromkeys(BY_TOKEN, tokens) | {key: [1.0] * len(made) for key in BY_UPDATE}
    metrics = {
        key: fsum(update[key] * w for update, w in zip(made, by, strict=True)) / max(fsum(by), 1.0)
        for key, by in weights.items()
        if key in made[0]
    }
    metrics["ratio/max"] = max(update["ratio/max"] for update in made)
    metrics["tokens/trained"] = fsum(tokens)
    if "skipped" in made[0]:
        metrics["skipped"] = fsum(update["skipped"] for update in made)
    return metrics | {"steps_without_signal": made[-1]["steps_without_signal"]}
