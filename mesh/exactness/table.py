"""Rows of a validation: a table for people, and the same content as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mesh.config.keys import conf_keys, value_of
from mesh.config.schema import Conf
from mesh.exactness.comparison import Tally
from mesh.lifecycle.process import Process
from mesh.program.plan import Plan
from mesh.runs.directory import describe_environment, describe_rank

RUNGS = ("L0", "L1", "L2", "L3", "L6")


@dataclass(frozen=True)
class Check:
    """One row of the table. `not_run`: why nothing was compared, and then nothing is promised;
    differ_without: comparisons that differ with ordinary kernels.
    """

    rung: str
    what: str
    tally: Tally = Tally()
    not_run: str | None = None
    differ_without: int | None = None

    @property
    def result(self) -> str:
        if self.not_run is not None:
            return "not run"
        return "pass" if self.tally.passed else "FAIL"


def with_control(checks: Sequence[Check], control: Sequence[Check]) -> list[Check]:
    """The checks, each with the count that differs in the walk with ordinary kernels."""
    found = {
        (check.rung, check.what): check.tally.different
        for check in control
        if check.not_run is None
    }
    return [replace(c, differ_without=found.get((c.rung, c.what))) for c in checks]


def header(control: bool = False) -> str:
    """The table's first line; with a control there is one column more."""
    text = f"{'rung':<5}{'compared':<66}{'comparisons':>12}  result"
    return f"{text}  differ without" if control else text


def line(check: Check) -> str:
    """A check as a row of the table; one that failed has the place on a second line."""
    count = "" if check.not_run is not None else f"{check.tally.compared:,}"
    without = "" if check.differ_without is None else f"{check.differ_without:,}"
    text = f"{check.rung:<5}{check.what:<66}{count:>12}  {check.result:<8}{without}".rstrip()
    if check.not_run is not None:
        text += f" ({check.not_run})"
    if check.result == "FAIL":
        text += f"\n     {failure(check.tally)}"
    return text


def failure(tally: Tally) -> str:
    """The failure of a tally that did not pass."""
    if tally.compared == 0:
        return "nothing was compared"
    counts = f"{tally.different:,} differ, {tally.not_finite:,} are not finite"
    return f"{counts}; first: {tally.first}"


def verdict(checks: Sequence[Check]) -> str:
    """The last line: the rungs that hold here."""
    held: list[str] = []
    broken: list[str] = []
    for rung in RUNGS:
        results = {check.result for check in checks if check.rung == rung} - {"not run"}
        if results:
            (broken if "FAIL" in results else held).append(rung)
    count = sum(check.tally.compared for check in checks)
    holds = "no rung of the exactness ladder holds here"
    if held:
        holds = f"{', '.join(held)} of the exactness ladder {'hold' if held[1:] else 'holds'} here"
    fails = f"; {', '.join(broken)} FAILED" if broken else ""
    return f"{count:,} comparisons: {holds}{fails}"


def passed(checks: Sequence[Check]) -> bool:
    """True if every promised rung holds."""
    return not any(check.result == "FAIL" for check in checks)


def as_json(conf: Conf, plan: Plan, process: Process, tested: str, checks: Sequence[Check]) -> str:
    """The table, the self-test's line, the machine and all keys. Collective: every rank tells."""
    ranks = process.gather(describe_rank(process))
    content: dict[str, Any] = {
        "passed": passed(checks),
        "verdict": verdict(checks),
        "self_test": tested,
        "machine": {
            "torch": torch.__version__,
            "device": ranks[0]["device"],
            "threads": ranks[0]["torch_threads"],
            "world_size": process.world_size,
            "ranks": ranks,
            "environment": describe_environment(),
        },
        "dtype": str(plan.trainer.dtype).removeprefix("torch."),
        "layouts": [check.what for check in checks if check.rung == "L3"],
        "keys": {name: value_of(conf, name) for name in conf_keys()},
        "checks": [row_of(check) for check in checks],
    }
    return json.dumps(content, indent=2) + "\n"


def row_of(check: Check) -> dict[str, Any]:
    """One check as JSON; logprobs, which may not be finite, are in the mismatch's values."""
    row = asdict(check) | {"result": check.result}
    if row["tally"]["first"] is not None:
        del row["tally"]["first"]["logprobs"]
    return row
