"""95% intervals of evaluation metrics over the problems of the set.

Where log.evaluations has left each problem's results, mean +- 1.96 standard errors of those. Else,
for shares, Wilson's interval of a share of so many problems (Wilson 1927): a problem's value lies
between 0 and 1, so the variance is at most that of a yes or no, and the interval is at least as
wide as it has to be.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.report.charts import OF_EVALUATION
from tools.report.curves import Points
from tools.report.reading import Run
from tools.report.thinning import number

Z = 1.959964
Ends = tuple[float, float]
Intervals = dict[str, dict[int, Ends]]
SHARES = re.compile(r"accuracy|accuracy_greedy|(?:pass|majority|maj)@\d+|response/truncated")
DEFAULT_PROMPTS = 256  # of eval.num_prompts, where a task draws its prompts without end
ENDLESS = ("spell_backward", "arithmetic", "calculator", "guess")


def intervals_of(run: Run, points: Points) -> Intervals:
    """The intervals of every evaluation metric that has one, by metric and step."""
    found: Intervals = {}
    measured = {step: errors_of(path) for step, path in results(run.path).items()}
    for name, (steps, values) in points.items():
        match = OF_EVALUATION.fullmatch(name)
        if match is None:
            continue
        problems = problems_of(run, match["set"] or "")
        share = SHARES.fullmatch(match["rest"]) is not None
        for step, value in zip(steps, values, strict=True):
            error = measured.get(step, {}).get((match["set"] or "", match["rest"]))
            if value is None:
                continue
            if error is not None:
                found.setdefault(name, {})[step] = (value - Z * error, value + Z * error)
            elif share and problems:
                found.setdefault(name, {})[step] = wilson(value, problems)
    return found


def wilson(share: float, count: int) -> Ends:
    """Wilson's 95% interval of a share of `count` problems."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = share * (1 - share) / count + Z * Z / (4 * count * count)
    half = Z * math.sqrt(max(spread, 0.0)) / (1 + Z * Z / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def problems_of(run: Run, name: str) -> int | None:
    """How many problems a set has, by the configuration; None: a data set decides."""
    of_set = run.settings.get(f"eval.sets.{name}")
    told = of_set.get("num_prompts") if isinstance(of_set, dict) else None
    for value in (told, run.settings.get("eval.num_prompts")):
        if (count := str(value)).isdigit() and int(count):
            return int(count)
    endless = not of_set and run.settings.get("task") in ENDLESS
    return DEFAULT_PROMPTS if endless else None


def results(run_dir: Path) -> Mapping[int, Path]:
    """The files of evaluations' results, by step."""
    paths = (run_dir / "evaluations").glob("step-*.jsonl")
    named = ((re.fullmatch(r"step-(\d+)\.jsonl", path.name), path) for path in paths)
    return {int(match[1]): path for match, path in named if match}


_errors: dict[tuple[Path, int, int], dict[tuple[str, str], float]] = {}


def errors_of(path: Path) -> dict[tuple[str, str], float]:
    """The standard error of each metric of a file of results, by set and metric; lines that cannot
    be read are left out. A file that does not change is read once."""
    try:
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in _errors:
            _errors[key] = read_errors(path.read_bytes().splitlines())
        return _errors[key]
    except OSError:
        return {}


def read_errors(lines: Sequence[bytes]) -> dict[tuple[str, str], float]:
    columns: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        metrics = row.get("metrics") if isinstance(row, dict) else None
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            known = number(value)
            if known is not None:
                columns.setdefault((str(row.get("set", "")), name), []).append(known)
    return {key: standard_error(values) for key, values in columns.items() if len(values) > 1}


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
