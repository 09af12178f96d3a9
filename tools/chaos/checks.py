"""Checks of a run that was killed and resumed; each function lists the problems it finds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mesh.checkpoint.folder import DAMAGED, PARTIAL, steps_in
from mesh.checkpoint.logs import KEPT_LOGS, LOGS
from mesh.model.weight_checks import weight_problems
from mesh.runs.compare import compare_runs, line_differences
from mesh.runs.lines import lines_in, read_lines
from mesh.runs.samples import SAMPLES, members, read_samples

KEPT = 2  # checkpoint.keep, as unset
METRIC = "eval/accuracy"  # checkpoint.best_metric, as unset
Texts = dict[str, bytes]


def newest(run_dir: Path) -> int | None:
    """The steps that the newest complete checkpoint holds; None where there is none."""
    path = run_dir / "checkpoints"
    return max(steps_in(path), default=None) if path.is_dir() else None


def kept_text(run_dir: Path, step: int) -> Texts:
    """The complete lines of the logs up to a step."""
    texts = {}
    for name in LOGS:
        lines = text_of(run_dir / name, killed=True).splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        texts[name] = b"".join(line for line in whole if json.loads(line)["step"] <= step)
    return texts


def text_of(log: Path, killed: bool = False) -> bytes:
    """The lines of a log, decompressed."""
    return b"".join(members(log, killed)) if log.name == SAMPLES else log.read_bytes()


def kept_problems(kept: Texts, reference: Path, step: int) -> list[str]:
    """First difference between the lines before a checkpoint and the uninterrupted run's."""
    found = []
    for name, text in kept.items():
        mine = [json.loads(line) for line in text.splitlines()]
        path = reference / name
        theirs = [line for line in lines_in(text_of(path), path) if line["step"] <= step]
        found += [f"before it was killed: {one}" for one in line_differences(name, mine, theirs)][
            :1
        ]
    return found


def refusal_problems(log: str, status: int) -> list[str]:
    """Resuming without a checkpoint must be refused with one of these messages."""
    if status != 0 and ("no intact checkpoint in" in log or "holds no run" in log):
        return []
    return [f"resuming without a checkpoint was not refused (status {status})"]


def resumed_problems(log: str, run_dir: Path, step: int) -> list[str]:
    """It must have resumed from this step, compared digests, and skipped no checkpoint."""
    path = run_dir / "checkpoints" / f"step-{step}"
    said = f"resumed from {path}: the digests of weights and moments match"
    found = [] if said in log else [f"it did not say: {said}"]
    return found + (["it skipped a checkpoint"] if f"skipping {path.parent}" in log else [])


def finished_problems(run_dir: Path, steps: int, samples_a_step: int) -> list[str]:
    """A finished run must have logs without gap or duplicate, all files, and no leftovers."""
    metrics, every = read_lines(run_dir / "metrics.jsonl"), read_samples(run_dir)
    samples = [line for line in every if line["split"] == "train"]
    found = []
    logged = [line["step"] for line in metrics]
    if logged != list(range(steps + 1)):
        found.append(f"metrics.jsonl holds steps {logged}")
    counts = Counter((line["step"], line["prompt_id"], line["sample_id"]) for line in samples)
    per_step = Counter(step for step, _, _ in counts)
    if len(counts) != len(samples) or per_step != dict.fromkeys(
        range(1, steps + 1), samples_a_step
    ):
        found.append(f"{SAMPLES} holds {len(samples)} rollouts, by step {dict(per_step)}")
    found += directory_problems(run_dir, steps, metrics[-1]["digest/weights"])
    return found or best_problems(run_dir, metrics)


def directory_problems(run_dir: Path, steps: int, digest: str) -> list[str]:
    """Checkpoints must be complete, and nothing partial may be left."""
    path = run_dir / "checkpoints"
    names = sorted(item.name for item in path.iterdir())
    found = [f"{name} was left" for name in names if name.endswith((PARTIAL, DAMAGED))]
    found += [f"{item} was left" for item in leftovers(run_dir)]
    if (run_dir / "model.partial").exists() or not (run_dir / "model").is_dir():
        found.append("the final model is not whole")
    held = steps_in(path)
    if not held or held[0] != steps or len(held) > KEPT:
        return [*found, f"checkpoints of steps {held} are kept"]
    index = json.loads((path / f"step-{steps}" / "index.json").read_text())
    if index["content"]["digests"]["weights"] != digest:
        found.append("the last checkpoint holds other weights than were logged")
    return found


def leftovers(run_dir: Path) -> list[Path]:
    """Partial files of the logs and the best models."""
    logs = (run_dir.glob(f"{name}{PARTIAL}") for name in KEPT_LOGS)
    places = (*logs, (run_dir / "best").glob(f"*{PARTIAL}"))
    return sorted(item.relative_to(run_dir) for place in places for item in place)


def best_problems(run_dir: Path, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The newest checkpoint must name the first of the best logged evaluations; exactly the models
    that checkpoints name must be kept."""
    logged = [line for line in metrics if METRIC in line]
    best = max(logged, key=lambda line: line[METRIC])  # of equal ones the first
    expected = {"step": best["step"], "value": best[METRIC], "metric": METRIC}
    path = run_dir / "checkpoints"
    named = {s: json.loads((path / f"step-{s}" / "index.json").read_text()) for s in steps_in(path)}
    bests = {step: index["content"]["best"] for step, index in named.items()}
    found = []
    if bests[max(bests)] != expected:
        found.append(f"the last checkpoint names {bests[max(bests)]} as best, not {expected}")
    held = steps_in(run_dir / "best") if (run_dir / "best").is_dir() else []
    if set(held) != {one["step"] for one in bests.values() if one}:
        found.append(f"best models of steps {held} are kept")
    return found + [
        f"the best model of step {step} is not whole: {wrong}"
        for step in held
        for wrong in weight_problems(run_dir / "best" / f"step-{step}", None)
    ]


def text_problems(run_dir: Path, kept: Sequence[Texts]) -> list[str]:
    """Lines before the checkpoints that the run resumed from must not change."""
    return [
        f"{name}: lines before the checkpoint have changed"
        for texts in kept
        for name, text in texts.items()
        if not text_of(run_dir / name, killed=True).startswith(text)
    ]


def exact_problems(run_dir: Path, reference: Path) -> list[str]:
    """The run must equal the uninterrupted one to the bit."""
    first = compare_runs(run_dir, reference).first
    return [f"not the uninterrupted run: {first}"] if first else []
