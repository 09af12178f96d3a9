"""The rungs of the exactness ladder that a run shows, and how that is known.

Nothing is taken on trust: a rung holds where the run's own numbers, its checks or a validation of
the same model, engine and machine say so; else it is unknown, or off without batch_invariant.
"""

from __future__ import annotations

import json
from typing import Any

from tools.report.curves import Points
from tools.report.reading import Line, Run
from tools.report.signals import of_trained

PROMISES = {
    "L0": "the same command twice gives the same tokens, losses and weights",
    "L1": "a sequence's logprobs do not depend on its batch, caching or packing",
    "L2": "trainer and generator logprobs are equal for every sampled token",
    "L3": "L2 where trainer and generator have different layouts",
    "L4": "the whole run is the same on any mesh",
    "L5": "a run killed and resumed is the run that was never killed",
    "L6": "the native engine and vLLM give the same bits",
}
SAME = ("model.path", "model.flavor", "engine", "vllm.model")  # keys that a validation must share
TOLD = ("yes", "no", "unknown", "off")
Row = dict[str, str]


def exactness_of(run: Run, points: Points) -> list[Row]:
    """One row for each rung: does it hold, and how is that known."""
    switched = str(run.settings.get("batch_invariant", "unknown")) == "true"
    validation, where = validation_of(run)
    rows = {rung: unknown(run, switched, validation) for rung in PROMISES}
    for rung, result in results(validation).items():
        if rung in rows and switched:
            rows[rung] = validated(result, validation or {}, where + of_commit(run, validation))
    own = measured(run, points, switched)
    if own is not None and (own[0] == "no" or rows["L2"][0] != "no"):
        also = rows["L2"][1] if rows["L2"][0] == "yes" and own[0] == "yes" else ""
        rows["L2"] = own[0], "; ".join(filter(None, [own[1], also]))
    rows["L4"] = "off", "Not promised: another layout sums gradients in another order."
    if switched:
        rows["L5"] = resumed(run)
    if run.settings and str(run.settings.get("engine", "native")) == "native":
        rows["L6"] = "off", "The run used the native engine."
    return [
        {"rung": rung, "promise": PROMISES[rung], "holds": holds, "how": how}
        for rung, (holds, how) in rows.items()
    ]


def unknown(run: Run, switched: bool, validation: Line | None) -> tuple[str, str]:
    """What is said of a rung of which nothing is known."""
    if "batch_invariant" not in run.settings:
        return "unknown", "The configuration cannot be read."
    if not switched:
        return "off", "batch_invariant=false: ordinary kernels, equal up to rounding."
    if validation is None:
        return "unknown", "No validation.json is in the run or beside it; run recipes/validate.py."
    return "unknown", "The validation did not compare this."


def validated(result: str, validation: Line, where: str) -> tuple[str, str]:
    """What a validation says of a rung."""
    when = environment_of(validation).get("started", "at an unknown time")
    how = f"recipes/validate.py, {when}, {where}: {result}"
    return ("no" if result == "FAIL" else "yes"), how + "."


def of_commit(run: Run, validation: Line | None) -> str:
    """What to say of a validation that another commit of the code has passed."""
    own = run.environments[-1].get("git") if run.environments else None
    other = environment_of(validation or {}).get("git")
    return " (of another commit)" if own and other and own != other else ""


def validation_of(run: Run) -> tuple[Line | None, str]:
    """The validation in the run directory, else one in a directory beside it that has the same
    model, engine and device; and where it is."""
    if run.validation is not None:
        return run.validation, "validation.json of this run"
    for path in sorted(run.path.resolve().parent.glob("*/validation.json")):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue  # another run's damaged file says nothing about this one
        if isinstance(found, dict) and is_about(found, run):
            return found, f"../{path.parent.name}/validation.json"
    return None, ""


def is_about(validation: Line, run: Run) -> bool:
    """True if a validation is of the model, the engine and the device of a run."""
    keys, machine = validation.get("keys"), validation.get("machine")
    if not isinstance(keys, dict) or not isinstance(machine, dict) or not run.environments:
        return False
    same = all(plain(keys.get(key)) == plain(run.settings.get(key)) for key in SAME)
    ranks = run.environments[-1].get("ranks")
    first = ranks[0] if isinstance(ranks, list) and ranks else None
    device = first.get("device") if isinstance(first, dict) else None
    return same and device is not None and machine.get("device") == device


def plain(value: Any) -> str:
    return "null" if value is None else str(value)


def environment_of(validation: Line) -> Line:
    machine = validation.get("machine")
    found = machine.get("environment") if isinstance(machine, dict) else None
    return found if isinstance(found, dict) else {}


def results(validation: Line | None) -> dict[str, str]:
    """By rung: pass, or FAIL if one of its rows failed; rungs that were compared only."""
    found: dict[str, str] = {}
    checks = (validation or {}).get("checks")
    for check in checks if isinstance(checks, list) else []:
        if isinstance(check, dict) and check.get("result") in ("pass", "FAIL"):
            rung = str(check.get("rung"))
            found[rung] = "FAIL" if "FAIL" in (found.get(rung), check["result"]) else "pass"
    return found


def measured(run: Run, points: Points, switched: bool) -> tuple[str, str] | None:
    """L2, of the run's own tokens: the largest difference of every step's logprobs."""
    steps, values = of_trained(points, "logprob_diff/max")["logprob_diff/max"]
    known = [(value, step) for step, value in zip(steps, values, strict=True) if value is not None]
    if not known:
        return None
    strict = str(run.settings.get("check", "null")) == "strict"
    checked = "; check=strict compared every token before the update" if strict else ""
    fewer = len(steps) < len(points["logprob_diff/max"][0])
    with_tokens = " that trained on any token" if fewer else ""
    first = next((step for value, step in known if value > 0), None)
    if first is None and len(known) == len(values):
        which = "the one step" if len(known) == 1 else f"all {len(known):,} steps"
        where = f"in {which}{with_tokens}{checked}"
        return "yes", f"logprob_diff/max is exactly 0 {where}."
    if first is None:
        return "no", f"logprob_diff/max is not finite in {len(values) - len(known):,} steps."
    largest = max(known)
    how = f"logprob_diff/max is above 0 from step {first} on, at most {largest[0]:.1e}"
    if "batch_invariant" not in run.settings:
        return "unknown", f"{how} (step {largest[1]}); whether batch_invariant was on is not known."
    return ("no" if switched else "off"), f"{how} (step {largest[1]})."


def resumed(run: Run) -> tuple[str, str]:
    """L5: a run cannot tell by itself; say how often it was resumed."""
    times = len(run.environments) - 1
    if times < 1:
        return "unknown", "The run was not resumed."
    again = "once" if times == 1 else f"{times} times"
    how = "compare it with a run that was never killed: tools/compare_runs.py"
    return "unknown", f"The run was resumed {again}; {how}."
