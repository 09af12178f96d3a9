"""What a run did, in one sentence and a few numbers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from tools.report.curves import Points
from tools.report.intervals import Intervals
from tools.report.reading import Run
from tools.report.settings import text, value_of
from tools.report.timeline import TimelineStep

Fact = dict[str, str]
RESULTS = ("eval/accuracy", "eval/reward")
PHASE, WALL_TIME = "seconds/", "Wall time"


def headline_of(
    run: Run, points: Points, intervals: Intervals, timeline: Sequence[TimelineStep]
) -> dict[str, Any]:
    """Title, sentence and facts; `exactness` is added by the caller."""
    name, first, last = result(points)
    facts = [
        fact("Task", text(run.settings.get("task", "unknown")), arguments(run, "task_args")),
        fact("Model", model(run), weights(run)),
        fact("Algorithm", text(run.settings.get("loss", "unknown")), batch(run)),
        *result_facts(points, intervals),
        fact("Steps", steps(run), ending(run)),
        *time_facts(run, points, timeline),
        *token_facts(points),
        *digest_facts(run),
    ]
    sentence = f"{text(run.settings.get('task', 'An unknown task'))} with {model(run)}: "
    if name is None:
        sentence += "nothing was evaluated or rewarded yet"
    elif first == last:
        sentence += f"{name} {show(first)}"
    else:
        sentence += f"{name} from {show(first)} to {show(last)}"
    title = run.path.resolve().name
    return {"title": title, "sentence": f"{sentence}, {steps(run)} steps.", "facts": facts}


def is_done(run: Run) -> bool:
    """True if the run came to its end: it has made every step, or has left its final model after
    its last step."""
    if run.steps >= (wanted(run) or math.inf):
        return True
    model, metrics = run.path / "model", run.path / "metrics.jsonl"
    both = model.is_dir() and metrics.exists()
    return both and model.stat().st_mtime >= metrics.stat().st_mtime


def wanted(run: Run) -> int | None:
    """The steps that were asked for: by the last start, which may have changed them, or the
    configuration, which is the first start's. What a start has changed is not known of runs of
    older versions, except by its command line."""
    last = run.environments[-1] if run.environments else {}
    value = str(run.settings.get("steps", ""))
    if isinstance(changed := last.get("changed"), dict):
        value = str(changed.get("steps", value))
    elif given := re.findall(r"(?<!\S)steps=(\d{1,12})(?!\S)", str(last.get("command", ""))):
        value = given[-1]
    return int(value) if re.fullmatch(r"[0-9]{1,12}", value) else None


def ending(run: Run) -> str:
    """How far the run came: a run that was asked to end, or that stop.after ended, has its final
    model before it has made its steps."""
    if run.steps >= (wanted(run) or math.inf):
        return "done"
    return "ended early, final model saved" if is_done(run) else "not finished"


def steps(run: Run) -> str:
    """`150`, or `70 of 150`."""
    asked = wanted(run)
    return f"{run.steps:,}" if asked in (None, run.steps) else f"{run.steps:,} of {asked:,}"


def model(run: Run) -> str:
    """The model's name: the last part of its path, or its size."""
    path = text(run.settings.get("model.path", "null"))
    if path != "null":
        return PurePath(path.removeprefix("package:")).name
    flavor = text(run.settings.get("model.flavor", "unknown"))
    return f"Qwen3 {flavor}" if flavor != "unknown" else "an unknown model"


def weights(run: Run) -> str:
    """Where the first weights came from."""
    path = text(run.settings.get("model.path", ""))
    if path == "null":
        return "random weights"
    drawn = run.settings.get("model.init") == "random"
    return f"random weights, shape of {path}" if drawn else path


def arguments(run: Run, prefix: str) -> str:
    """The free keys below a key."""
    listed = [
        f"{name.removeprefix(prefix + '.')}={value_of(name, value)}"
        for name, value in run.settings.items()
        if name.startswith(f"{prefix}.")
    ]
    return ", ".join(listed)[:300]


def batch(run: Run) -> str:
    """`64 prompts x 8 rollouts a step, lr 0.0006`."""
    read = {key: text(run.settings.get(key, "?")) for key in ("num_prompts", "group_size")}
    rate = text(run.settings.get("trainer.lr", "?"))
    return f"{read['num_prompts']} prompts x {read['group_size']} rollouts a step, lr {rate}"


def result(points: Points) -> tuple[str | None, float | None, float | None]:
    """The metric that stands for the result, its first and its last value: accuracy on held-out
    prompts; else their reward; else that of training."""
    for name in (*RESULTS, "reward/mean"):
        if known := values_of(points, name):
            label = {"eval/accuracy": "held-out accuracy", "eval/reward": "held-out reward"}
            return label.get(name, "training reward"), known[0], known[-1]
    return None, None, None


def result_facts(points: Points, intervals: Intervals) -> list[Fact]:
    """First and last value of every set's accuracy, greedy accuracy and reward."""
    found = []
    for name in sorted(points):
        if not re.fullmatch(r"eval/(?:[\w-]+/)?(?:accuracy|accuracy_greedy|reward)", name):
            continue
        steps, values = points[name]
        known = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        if not known:
            continue
        (_, first), (step, last) = known[0], known[-1]
        shown = show(first) if len(known) == 1 else f"{show(first)} to {show(last)}"
        best, best_step = max((value, -step) for step, value in known)
        note = f"best {show(best)} at step {-best_step}"
        if ends := intervals.get(name, {}).get(step):
            note = f"95% interval {show(ends[0])} to {show(ends[1])}; {note}"
        found.append(fact(name, shown, note))
    return found


def time_facts(run: Run, points: Points, timeline: Sequence[TimelineStep]) -> list[Fact]:
    """Wall time of the logged steps. A step takes from its first begin to its last end on any rank;
    without a timeline, the sum of its phases, which counts phases twice that ranks run at once."""
    seconds: dict[int, float] = defaultdict(float)
    for name in points:
        if name.startswith(PHASE):
            for step, value in zip(*points[name], strict=True):
                seconds[step] += value or 0.0
    known = {step.step: step.seconds for step in timeline}
    total = sum((dict(seconds) | known).values())
    if not total:
        return []
    note = f"all logged steps, {total / max(run.steps, 1):.2f} s a step"
    if not seconds.keys() <= known.keys():
        note += ", at most: the sum of their phases"
    if len(run.environments) > 1:
        note += f", {len(run.environments)} starts"
    return [fact(WALL_TIME, duration(total), note)]


def token_facts(points: Points) -> list[Fact]:
    """Tokens of all training steps."""
    labels = {"tokens/generated": "Tokens generated", "tokens/trained": "Tokens trained on"}
    return [
        fact(label, f"{round(sum(values_of(points, name))):,}", "without evaluations")
        for name, label in labels.items()
        if name in points
    ]


def digest_facts(run: Run) -> list[Fact]:
    """The digest of the last weights, by which a run is known to the bit."""
    for line in reversed(run.metrics):
        if isinstance(digest := line.get("digest/weights"), str):
            return [fact("Weights", digest[:80], f"digest after step {line['step']}")]
    return []


def values_of(points: Points, name: str) -> list[float]:
    """The finite values of a metric."""
    return [value for value in points.get(name, ([], []))[1] if value is not None]


def show(value: float | None) -> str:
    """A result with three digits behind the point."""
    return "unknown" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def fact(label: str, value: str, note: str = "") -> Fact:
    return {"label": label, "value": value, "note": note}
