"""Findings about exactness, failures, evaluations and starts of a run; and the list of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from tools.report.findings import BAD, INFO, LEARNING, WARN, Evidence, Find, Finding
from tools.report.rank_findings import slow_rank, waiting
from tools.report.signals import Signal

MISMATCH, LARGE_MISMATCH, MISMATCH_STEPS = 0.02, 0.1, 5


def mismatch(evidence: Evidence) -> Iterator[Finding]:
    """Any difference of logprobs with batch_invariant=true; else a mean of more than 0.02 nats in
    the running median."""
    if evidence.key("batch_invariant") == "true":
        yield from inexact(evidence)
        return
    mean = evidence["logprob_diff/mean"].smooth()
    if span := mean.streak(lambda value: value > MISMATCH, MISMATCH_STEPS):
        most = max(mean.values)
        yield Finding(
            BAD if most > LARGE_MISMATCH else WARN, "Trainer and generator disagree", span[0],
            f"Their logprobs of a token differ by more than {MISMATCH} nats on average from step "
            f"{span[0]} on, up to {most:.3g}; rounding alone usually gives less.",
            "batch_invariant=true makes them equal to the bit; importance=tis corrects for the "
            "difference; sync.verify=every compares the weights after every sync.",
        )  # fmt: skip


def inexact(evidence: Evidence) -> Iterator[Finding]:
    """Logprobs that differ though the run promises equal bits."""
    largest = evidence["logprob_diff/max"]
    steps = [s for s, v in zip(largest.steps, largest.values, strict=True) if v > 0]
    if steps:
        yield Finding(
            BAD, "Not exact, though batch_invariant is on", steps[0],
            f"logprob_diff/max is above 0 in {len(steps):,} of {len(largest.steps):,} steps, up to "
            f"{max(largest.values):.3g}.",
            "check=strict ends the run at the first such token and names the module; "
            "recipes/validate.py compares this machine rung by rung.",
        )  # fmt: skip


def strict_stop(evidence: Evidence) -> Iterator[Finding]:
    """The run was ended by check=strict."""
    report = evidence.run.strict
    if report is not None:
        step = report.get("step")
        yield Finding(
            BAD, "Ended by check=strict", step if isinstance(step, int) else None,
            "A token's logprobs differ between trainer and generator; strict.json in the run's "
            "directory names it, and the first divergent module.",
            "Run recipes/validate.py on this machine, and report what it names.",
        )  # fmt: skip


OFTEN = 0.1


def skipped(evidence: Evidence) -> Iterator[Finding]:
    """Updates that were not finite and were left out."""
    counts = evidence["skipped"]
    steps = [s for s, v in zip(counts.steps, counts.values, strict=True) if v > 0]
    if steps:
        often = len(steps) > OFTEN * len(counts.steps)
        yield Finding(
            BAD if often else WARN, "Updates were skipped", steps[0],
            f"In {len(steps):,} of {len(counts.steps):,} steps a loss, gradient or logprob was not "
            "finite, and the update was left out (on_nonfinite=skip).",
            "Lower trainer.lr or trainer.clip_norm, or lengthen trainer.warmup_steps; "
            "on_nonfinite=stop ends the run and names the sequences.",
        )  # fmt: skip


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """Logged numbers that are not finite, which steps that were skipped have as well."""
    if any(evidence["skipped"].values):
        return
    found: dict[str, int] = {}
    for name, (steps, values) in evidence.points.items():
        if None in values:
            found[name] = steps[values.index(None)]
    if found:
        step = min(found.values())
        names = ", ".join(sorted(found)[:6]) + (" and others" if len(found) > 6 else "")
        yield Finding(
            BAD if {"loss", "grad_norm"} & found.keys() else WARN, "Numbers that are not finite",
            step, f"NaN or infinity was logged for {names}, at step {step} for the first time.",
            "Lower trainer.lr or trainer.clip_norm; look at what the score returns; "
            "on_nonfinite=stop names the sequences.",
        )  # fmt: skip


SPIKE, BEFORE, MANY = 10.0, 20, 3


def gradient_spikes(evidence: Evidence) -> Iterator[Finding]:
    """Gradient norms of ten times the median of the twenty before that were not 0."""
    norms = evidence["grad_norm"]
    spikes, seen = list[tuple[int, float]](), list[float]()
    for step, value in zip(norms.steps, norms.values, strict=True):
        if len(seen) >= BEFORE // 2 and value > SPIKE * statistics.median(seen[-BEFORE:]):
            spikes.append((step, value))
        elif value > 0:
            seen.append(value)
    if spikes:
        most = max(value for _, value in spikes)
        times = "In 1 step" if len(spikes) == 1 else f"In {len(spikes)} steps"
        yield Finding(
            WARN if len(spikes) >= MANY else INFO, "Gradient spikes", spikes[0][0],
            f"{times} the gradient norm was more than {SPIKE:.0f} times the median of the steps "
            f"before, up to {most:.3g}; it is clipped to "
            f"trainer.clip_norm={evidence.key('trainer.clip_norm')}.",
            "Read the rollouts of such a step; a larger num_prompts or group_size, a lower "
            "trainer.lr or trainer.clip_norm=0.2 make an update depend less on a few of them.",
        )  # fmt: skip


WORSE = 0.05  # where no interval is known


def worse_evaluation(evidence: Evidence) -> Iterator[Finding]:
    """The last evaluation is below the best one by more than both intervals allow. A reward, which
    has no interval, is looked at where there is no accuracy."""
    names = [n for n in ("eval/accuracy", "eval/reward") if len(evidence[n].steps) >= 3]
    for name in names[:1]:
        known = evidence[name]
        best = max(known.values)
        step = known.steps[known.values.index(best)]
        margin = margin_of(evidence, name, step, known)
        if best - known.values[-1] > margin:
            beyond = f"a fall beyond the uncertainty of the two (±{margin:.3f})"
            said = beyond if evidence.intervals.get(name) else "of which no interval is known"
            yield Finding(
                WARN, "The evaluation got worse", step,
                f"{name} was {best:.3f} at step {step} and is {known.values[-1]:.3f} at step "
                f"{known.steps[-1]}, {said}.",
                "checkpoint.best=true keeps the model of the best evaluation in RUN_DIR/best; "
                "stop.after=3 ends a run that no longer improves; a lower trainer.lr may help.",
            )  # fmt: skip


def margin_of(evidence: Evidence, name: str, step: int, known: Signal) -> float:
    """How much two evaluations may differ by chance: half their intervals, as independent."""
    by_step = evidence.intervals.get(name, {})
    ends = [by_step.get(step), by_step.get(known.steps[-1])]
    halves = [(high - low) / 2 for low, high in filter(None, ends)]
    if len(halves) == 2:
        return float(sum(half * half for half in halves)) ** 0.5
    return WORSE * max(1.0, max(map(abs, known.values)))


def no_evaluation(evidence: Evidence) -> Iterator[Finding]:
    """A run of ten steps or more that evaluated nothing."""
    if evidence.run.steps >= 10 and not any(n.startswith("eval/") for n in evidence.points):
        yield Finding(
            INFO, "No evaluation", None,
            "Nothing was measured on held-out prompts: the training reward alone cannot tell "
            "learning from exploiting the score.",
            "eval.every=10 with eval.num_prompts=256 evaluates as the run goes.",
        )  # fmt: skip


PAUSE = 5.0  # times the usual distance of two steps


def resumed(evidence: Evidence) -> Iterator[Finding]:
    """More than one start of the run; a pause in the timeline tells where."""
    starts = len(evidence.run.environments)
    if starts > 1:
        yield Finding(
            INFO, "The run was resumed", pause_of(evidence),
            f"The run was started {starts} times. Each start continues the logs of the checkpoint "
            "that it resumed, without gap or duplicate; the environment below lists all starts.",
            "",
        )  # fmt: skip


def pause_of(evidence: Evidence) -> int | None:
    """The step before which most time passed, if it is far more than usual."""
    begun = [
        (line["step"], float(began))
        for line in evidence.run.timeline
        if isinstance(began := line.get("began"), int | float)
    ]
    gaps = [(b[1] - a[1], b[0]) for a, b in zip(begun, begun[1:], strict=False)]
    if len(gaps) < 3:
        return None
    longest, step = max(gaps)
    return step if longest > PAUSE * statistics.median(gap for gap, _ in gaps) else None


ALL: tuple[Find, ...] = (
    *LEARNING, mismatch, strict_stop, skipped, nonfinite, gradient_spikes, worse_evaluation,
    no_evaluation, resumed, slow_rank, waiting,
)  # fmt: skip
