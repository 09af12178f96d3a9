"""Health of a run in words: what went wrong, from which step on, and what to try.

Every finding is a function of what was logged. The thresholds stand beside it as constants;
docs/seeing.md lists them. What a run warns about while it goes (mesh/runs/warnings.py) has the same
text here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mesh.runs.warnings import (
    KINDS,
    Kind,
    lacks_groups,
    mostly_truncated,
    skips_prompts,
    waives_bounds,
    without_signal,
)
from tools.report.curves import Points
from tools.report.intervals import Intervals
from tools.report.reading import Run
from tools.report.signals import Signal, of_trained, signal
from tools.report.timeline import TimelineStep

BAD, WARN, INFO = "bad", "warn", "info"
ORDER = (BAD, WARN, INFO)
SOLVED = 0.9  # share of right answers from which silence is success


@dataclass(frozen=True)
class Finding:
    """severity: one of ORDER; step: where it began, None where it is about the whole run; remedy:
    what to try."""

    severity: str
    title: str
    step: int | None
    text: str
    remedy: str


@dataclass(frozen=True)
class Evidence:
    """What findings are made of."""

    run: Run
    points: Points
    intervals: Intervals
    timeline: Sequence[TimelineStep]

    def __getitem__(self, name: str) -> Signal:
        return signal(self.points, name)

    def key(self, name: str) -> str:
        """A key of the configuration as text; "unknown" where it was not read."""
        return str(self.run.settings.get(name, "unknown"))

    @property
    def solved(self) -> bool:
        """True if the last answers are nearly all right."""
        for name in ("eval/accuracy", "reward/correct"):
            if known := self[name]:
                return known.last(3) >= SOLVED
        return False


Find = Callable[[Evidence], Iterator[Finding]]


def findings_of(evidence: Evidence, kinds: Sequence[Find]) -> list[dict[str, Any]]:
    """All findings, the worst first and those of a severity by step, as the page takes them."""
    found = [finding for find in kinds for finding in find(evidence)]
    found.sort(key=lambda one: (ORDER.index(one.severity), one.step or 0))
    return [renamed(asdict(finding)) for finding in found]


def renamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {"try" if name == "remedy" else name: value for name, value in fields.items()}


# of each kind of warning: severity, title, and how many clauses of its text say what happened
WARNED: Mapping[Callable[..., bool], tuple[str, str, int]] = {
    without_signal: (BAD, "Steps without signal", 2),
    mostly_truncated: (BAD, "Most responses were truncated", 1),
    skips_prompts: (INFO, "Prompts were skipped", 1),
    lacks_groups: (WARN, "Dynamic sampling did not fill the step", 1),
    waives_bounds: (INFO, "Too few prompts of the wanted difficulty", 1),
}


def warned(evidence: Evidence) -> Iterator[Finding]:
    """What the run warned about as it went, each kind once, with how many steps it holds in."""
    lines = [line for line in evidence.run.metrics if "grad_norm" in line]
    for kind in KINDS:
        if kind.holds in WARNED and (due := first_due(kind, lines)) is not None:
            yield as_finding(kind, lines, due, evidence)


def first_due(kind: Kind, lines: Sequence[Mapping[str, Any]]) -> int | None:
    """The place of the line at which a kind of warning is due first."""
    streak = 0
    for place, line in enumerate(lines):
        streak = streak + 1 if holds(kind, line) else 0
        if streak == kind.steps:
            return place
    return None


def holds(kind: Kind, line: Mapping[str, Any]) -> bool:
    """True if a kind holds of a line; a metric that is no number there says nothing."""
    numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
    return kind.holds(numbers)


def as_finding(
    kind: Kind, lines: Sequence[Mapping[str, Any]], due: int, evidence: Evidence
) -> Finding:
    severity, title, clauses = WARNED[kind.holds]
    text = kind.text(lines[due]["step"], lines[due]).removeprefix("warning: ")
    parts = text.split("; ")
    count = sum(holds(kind, line) for line in lines)
    said = f"{capital('; '.join(parts[:clauses]))}. It holds in {count:,} of {len(lines):,} steps."
    if kind.holds is without_signal and evidence.solved:
        severity, title = INFO, "Nothing left to learn"
    elif severity == BAD and count < len(lines) / 10:
        severity = WARN
    begun = lines[due - kind.steps + 1]["step"]
    remedy = f"{capital('; '.join(parts[clauses:]))}."
    if kind.holds is without_signal:
        remedy = fallen_before(evidence["reward/mean"], begun) + remedy
    return Finding(severity, title, begun, said, remedy)


def fallen_before(reward: Signal, step: int) -> str:
    """What comes first where rewards fell before they became equal: prompts are not the cause."""
    highest, now = reward.before(step), reward.at(step)
    if highest is None or now is None or highest <= now:
        return ""
    fell = f"The mean reward fell from {highest:.3g} to {now:.3g} first"
    return f"{fell}: lower trainer.lr; kl_coef=0.01 holds the policy near its start. "


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


TRUNCATED, TRUNCATED_STEPS = 0.2, 5


def truncation(evidence: Evidence) -> Iterator[Finding]:
    """More than a fifth of the responses cut, in the running median; more than half is a warning
    of the run's own."""
    share = evidence["response/truncated"] or evidence["truncated"]
    if any(value > 0.5 for value in share.values):
        return
    if span := share.smooth().streak(lambda value: value > TRUNCATED, TRUNCATED_STEPS):
        most = max(share.values)
        yield Finding(
            WARN, "Responses are truncated", span[0],
            f"From step {span[0]} to {span[1]} more than {TRUNCATED:.0%} of the responses were cut "
            f"before the model ended them, up to {most:.0%}; they are scored as they are.",
            "Raise generator.max_new_tokens, or ask for shorter responses; truncated=mask leaves "
            "them out of the loss.",
        )  # fmt: skip


COLLAPSED, OF_FIRST, COLLAPSED_STEPS = 0.05, 0.2, 5


def entropy(evidence: Evidence) -> Iterator[Finding]:
    """Running median below 0.05 nats and a fifth of the first steps', in a run whose answers are
    not nearly all right."""
    measured = signal(of_trained(evidence.points, "entropy"), "entropy")
    if len(measured.steps) < 2 * COLLAPSED_STEPS or evidence.solved:
        return
    first = measured.first()
    limit = min(COLLAPSED, OF_FIRST * first)
    if span := measured.smooth().streak(lambda value: value < limit, COLLAPSED_STEPS):
        yield Finding(
            BAD, "Entropy collapsed", span[0],
            f"The entropy fell from {measured.values[0]:.3g} nats at step {measured.steps[0]} to "
            f"{measured.last():.3g}: from step {span[0]} on the model gives nearly the same "
            "response every time, and a group whose rewards are equal teaches nothing.",
            "Lower trainer.lr; a larger clip_high (0.28) leaves room for rare tokens; "
            "entropy_coef=0.001 adds an entropy bonus; kl_coef=0.01 holds the policy near its "
            "start; a higher generator.temperature keeps responses apart.",
        )  # fmt: skip


LONGER, MORE_TOKENS, CUT = 2.0, 8.0, 0.1


def length(evidence: Evidence) -> Iterator[Finding]:
    """Running median of the mean length at twice the first steps', without a higher reward, or
    with more than a tenth of the responses cut."""
    measured, reward = evidence["response_length/mean"], evidence["reward/mean"]
    if len(measured.steps) < 10 or not reward:
        return
    first = measured.first()
    limit = max(LONGER * first, first + MORE_TOKENS)
    span = measured.smooth().streak(lambda value: value >= limit, 5)
    if span is None:
        return
    cut = evidence["response/truncated"].at(span[1]) or 0.0
    better = reward.last() > reward.first() + reward.noise()
    if better and cut <= CUT:
        return
    yield Finding(
        BAD if cut > CUT else WARN, "Responses grow without gain", span[0],
        f"The mean length went from {first:.0f} to {measured.last():.0f} tokens, and is at least "
        f"twice that of the first steps from step {span[0]} on, while the reward went from "
        f"{reward.first():.3f} to {reward.last():.3f}; {cut:.0%} of the responses are cut.",
        "length_penalty=1 with length_penalty_tokens takes reward from long responses; "
        "loss=dr_grpo or aggregation=constant do not favour long wrong ones; truncated_reward=0 "
        "gives cut ones nothing.",
    )  # fmt: skip


EQUAL, EQUAL_STEPS = 0.8, 10


def dead_groups(evidence: Evidence) -> Iterator[Finding]:
    """Running median of the share of equal groups above 0.8 for ten steps; not said beside rewards
    that never vary."""
    share, spread = evidence["equal_groups"], evidence["reward/std"]
    if spread and not any(spread.values):
        return
    span = share.smooth().streak(lambda value: value >= EQUAL, EQUAL_STEPS)
    if span is None:
        return
    reward = evidence["reward/mean"]
    severity = INFO if evidence.solved else WARN
    inside = [
        v for s, v in zip(reward.steps, reward.values, strict=True) if span[0] <= s <= span[1]
    ]
    level = f"; the mean reward was {statistics.fmean(inside):.3f}." if inside else "."
    yield Finding(
        severity, "Most groups are equal", span[0],
        f"From step {span[0]} to {span[1]} in at least {EQUAL:.0%} of the groups all rewards were "
        f"equal, and such groups teach nothing{level}",
        "refill_rounds=2 draws other prompts in their place; difficulty.min and difficulty.max "
        "leave out prompts that are always or never solved; a larger group_size or a higher "
        "generator.temperature makes rewards differ more often.",
    )  # fmt: skip


def constant_rewards(evidence: Evidence) -> Iterator[Finding]:
    """The deviation of the rewards is 0 in every step, three or more."""
    spread, reward = evidence["reward/std"], evidence["reward/mean"]
    if len(spread.steps) < 3 or any(spread.values) or not reward or evidence.solved:
        return
    yield Finding(
        BAD, "Rewards never vary", spread.steps[0],
        f"In each of the {len(spread.steps):,} steps all rollouts had the same reward, "
        f"{reward.values[-1]:.3g} in the last one: there is nothing to learn from.",
        "Read the rollouts below: is the score right, and can a response get another one? If so, "
        "use easier prompts, a part of the score that is within reach, or a warm start by "
        "recipes/sft.py.",
    )  # fmt: skip


FALLEN, OF_NOISE = 0.25, 4.0


def falling_reward(evidence: Evidence) -> Iterator[Finding]:
    """The running mean of the reward ends below its peak by a quarter of the rollouts' usual
    deviation, and four times its own noise."""
    reward, spread = evidence["reward/mean"], evidence["reward/std"]
    window = max(5, len(reward.steps) // 15)
    if len(reward.steps) < 4 * window:
        return
    means = reward.means(window)
    peak = max(means.values)
    step = means.steps[means.values.index(peak)]
    drop = peak - means.values[-1]
    usual = spread.smooth(1).first(len(spread.values)) if spread else 0.0
    if drop <= max(FALLEN * usual, OF_NOISE * reward.noise() / window**0.5, 1e-9):
        return
    yield Finding(
        BAD if drop > usual else WARN, "The reward fell", step,
        f"The mean reward of {window} steps was highest, {peak:.3f}, up to step {step}, and is "
        f"{means.values[-1]:.3f} at the end.",
        "Lower trainer.lr, or let it decay (trainer.decay=cosine); kl_coef=0.01 holds the policy "
        "near its start; with checkpoint.best=true RUN_DIR/best has the model of the best "
        "evaluation; stop.after ends a run that no longer improves.",
    )  # fmt: skip


LEARNING: tuple[Find, ...] = (
    warned, truncation, entropy, length, dead_groups, constant_rewards, falling_reward,
)  # fmt: skip
