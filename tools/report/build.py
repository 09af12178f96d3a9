"""The data of the report page: one entry per run, and what differs between them.

tools/report/page draws it; `window.DATA` is its name there. Numbers are those of the run's files,
rounded to six digits; what is dense is thinned (thinning.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.report.comparison import comparison_of
from tools.report.curves import Points, curves_of, phases_of, points_of, speed_curves
from tools.report.exactness import exactness_of
from tools.report.findings import Evidence, findings_of
from tools.report.headline import headline_of, is_done
from tools.report.hiding import hidden
from tools.report.intervals import intervals_of
from tools.report.options import Options
from tools.report.reading import Run, read_run
from tools.report.run_findings import ALL
from tools.report.samples import BUDGET, samples_of
from tools.report.scrubbing import scrubbed
from tools.report.settings import config_of, environment_of
from tools.report.speed import speed_facts
from tools.report.timeline import timeline_of, timeline_steps

VERSION = 1
Data = dict[str, Any]


def report_data(run_dirs: Sequence[Path], options: Options = Options()) -> Data:  # noqa: B008
    """The data of a page about these runs. Raises ValueError where a directory holds no run."""
    runs = [read_run(path) for path in run_dirs]
    points = [points_of(run) for run in runs]
    shown = [run_data(run, held, len(runs)) for run, held in zip(runs, points, strict=True)]
    for run, name in zip(shown, distinct([run.path for run in runs]), strict=True):
        run["name"] = name
    data: Data = {
        "version": VERSION,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "runs": shown,
        "comparison": comparison_of(runs, points, shown) if len(runs) > 1 else None,
    }
    data = hidden(scrubbed(data), runs, options.hide)
    if options.title:
        data["runs"][0]["headline"]["title"] = options.title
    return data


def distinct(paths: Sequence[Path]) -> list[str]:
    """The names of directories, with their parent's where several have one name; with a number
    where an earlier one has the same all the same."""
    full = [path.resolve() for path in paths]
    once = Counter(path.name for path in full)
    wanted = [path.name if once[path.name] == 1 else "/".join(path.parts[-2:]) for path in full]
    names: list[str] = []
    for name in wanted:
        same = wanted[: len(names)].count(name)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def run_data(run: Run, points: Points, runs: int) -> Data:
    """What the page shows of one run of several."""
    intervals = intervals_of(run, points)
    steps = timeline_steps(run)
    headline = headline_of(run, points, intervals, steps)
    return {
        "name": run.path.resolve().name,
        "done": is_done(run),
        "headline": headline | {"exactness": exactness_of(run, points)},
        "curves": curves_of(points, intervals, runs),
        "speed": {
            "phases": phases_of(points),
            "curves": speed_curves(points, runs),
            "facts": speed_facts(points),
        },
        "timeline": timeline_of(steps, runs),
        "findings": findings_of(Evidence(run, points, intervals, steps), ALL),
        "config": config_of(run),
        "environment": environment_of(run),
        "samples": samples_of(run, BUDGET // runs),
        "profiles": [{"name": name, "text": text} for name, text in run.profiles],
        "missing": run.missing,  # last: what is read above adds to it
    }
