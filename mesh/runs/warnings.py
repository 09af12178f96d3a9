"""Warnings about steps that a run takes without an error and learns little or nothing from.

They follow from a step's metrics alone, and change nothing of the run. A kind of step that lasts is
warned about once, when its streak has become long enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """Steps of one kind. text: the warning, of a step and its metrics; steps: how many in a row
    it takes; once: not again in this start of the run, whatever comes between."""

    holds: Callable[[Metrics], bool]
    text: Callable[[int, Metrics], str]
    steps: int
    once: bool = False


def without_signal(metrics: Metrics) -> bool:
    """True if the gradient of the whole step was exactly 0."""
    return metrics.get("grad_norm") == 0


def no_signal_text(step: int, metrics: Metrics) -> str:
    if metrics.get("equal_groups") == 1:
        why = "all rewards of a group are equal, in every group"
        remedy = (
            "use prompts that are answered right sometimes and not always, a larger group_size, or "
            "a higher generator.temperature"
        )
    elif metrics.get("tokens/trained") == 0:
        why, remedy = "no token entered the loss", "look at drop_equal_groups and truncated"
    else:
        why, remedy = "the loss has no gradient", "look at the loss and the advantages"
    return (
        f"warning: {NO_SIGNAL_STEPS} steps in a row, up to step {step}, had no signal: the "
        f"gradient was exactly 0, so they changed no weight; {why}; {remedy}"
    )


def mostly_truncated(metrics: Metrics) -> bool:
    """True if more than half of the step's responses were cut."""
    return metrics.get("response/truncated", 0) > 0.5


def truncated_text(step: int, metrics: Metrics) -> str:
    return (
        f"warning: {metrics['response/truncated']:.0%} of the responses of step {step} were "
        "truncated: they are unfinished, and so is what was scored; raise "
        "generator.max_new_tokens, or ask for shorter responses; truncated=mask leaves them out of "
        "the loss, and truncated_reward gives them a reward of your own"
    )


def skips_prompts(metrics: Metrics) -> bool:
    """True if prompts of the step were replaced by others."""
    return metrics.get("prompts/skipped", 0) > 0


def skipped_text(step: int, metrics: Metrics) -> str:
    return (
        f"warning: step {step} skipped {metrics['prompts/skipped']:.0f} prompts that leave no room "
        "for a response or that the tokenizer cannot encode, and drew others (overlong=skip); the "
        "metric prompts/skipped counts them from now on"
    )


def lacks_groups(metrics: Metrics) -> bool:
    """True if the rounds of dynamic sampling did not fill the step."""
    return metrics.get("groups/missing", 0) > 0


def missing_text(step: int, metrics: Metrics) -> str:
    kept, missing = metrics["groups/kept"], metrics["groups/missing"]
    return (
        f"warning: step {step} trains on {kept:.0f} of {kept + missing:.0f} groups: those of its "
        f"other prompts, {metrics['prompts/drawn']:.0f} in all, are equal in refill_on, and "
        "refill_rounds is used up; use a larger refill_rounds or group_size, or prompts that are "
        "answered right sometimes and not always; the metric groups/missing counts on"
    )


def waives_bounds(metrics: Metrics) -> bool:
    """True if too few questions have a pass rate within the bounds."""
    return metrics.get("difficulty/waived", 0) > 0


def waived_text(step: int, metrics: Metrics) -> str:
    return (
        f"warning: step {step} has {metrics['difficulty/waived']:.0f} prompts that difficulty.min "
        "and difficulty.max would leave out: no others were found; the metric difficulty/waived "
        "counts them from now on"
    )


NO_SIGNAL_STEPS = 3
KINDS = (
    Kind(without_signal, no_signal_text, NO_SIGNAL_STEPS),
    Kind(mostly_truncated, truncated_text, 1),
    Kind(skips_prompts, skipped_text, 1, once=True),
    Kind(lacks_groups, missing_text, 1, once=True),
    Kind(waives_bounds, waived_text, 1, once=True),
)


class StepWarnings:
    """Owns the length of each kind's present streak, and what has been said once."""

    def __init__(self) -> None:
        self._streaks = dict.fromkeys(KINDS, 0)
        self._said: set[Kind] = set()

    def see(self, step: int, metrics: Metrics) -> list[str]:
        """The warnings that are due after a step that was trained on."""
        for kind in KINDS:
            self._streaks[kind] = self._streaks[kind] + 1 if kind.holds(metrics) else 0
        due = [kind for kind in KINDS if self._streaks[kind] == kind.steps]
        due = [kind for kind in due if not (kind.once and kind in self._said)]
        self._said |= set(due)
        return [kind.text(step, metrics) for kind in due]
