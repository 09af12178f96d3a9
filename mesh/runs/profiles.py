"""Profiles of single steps on one rank: a trace of every operation, and a table of what took long.

The trace opens in ui.perfetto.dev and chrome://tracing. A profiled step is slower than others, and
writing its trace takes seconds; both are left out of the pace that the run displays.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.config.sections import ProfileConf
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import PHASES
from mesh.runs.trace_table import phase_times, table_of

FOLDER = "profiles"


def profiled(
    steps: Iterable[int],
    conf: ProfileConf,
    run_dir: Path,
    process: Process,
    leave_out: Callable[[], None],
) -> Iterator[int]:
    """The steps, counted from 0, in order; while the caller takes one of `profile.steps`, counted
    from 1, it is profiled. Then all ranks meet, and `leave_out` is called.

    A step that fails, or after which the caller takes no other, leaves no profile behind, unless
    it is the last one. RuntimeError where a profile cannot be written.
    """
    for step in steps:
        if step + 1 not in conf.steps:
            yield step
            continue
        profiler = _profiler(process.device) if process.rank == conf.rank else None
        if profiler is not None:
            profiler.start()
        yield step
        name = f"step-{step + 1}-rank-{conf.rank}"
        if profiler is not None:
            profiler.stop()
            _write(profiler, run_dir / FOLDER, name)
        process.gather(None)  # nobody begins the next step before it is written
        leave_out()
        process.say(
            f"profile {run_dir / FOLDER / name}.json.gz, and a table, {name}.txt, beside it"
        )


def _profiler(device: torch.device) -> profile:
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])


def _write(profiler: profile, folder: Path, name: str) -> None:
    trace = folder / f"{name}.json.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        title = f"{name}: what took the time, without what it called in turn"
        (folder / f"{name}.txt").write_text(table_of(title, phase_times(events, PHASES)))
    except OSError as error:
        raise RuntimeError(f"{trace}: cannot be written ({error.strerror})") from error


def profile_problems(conf: Conf, world_size: int) -> list[str]:
    """Steps that the run does not take, and a rank that it does not have."""
    found, keys = [], conf.profile
    beyond = [step for step in keys.steps if step > conf.steps]
    if beyond:
        wrong = f"the run ends with step {conf.steps}"
        found.append(problem("profile.steps", keys.steps, wrong, f"use steps 1 to {conf.steps}"))
    if keys.rank >= world_size:
        wrong = f"the run has {world_size} rank{'s' * (world_size > 1)}, counted from 0"
        found.append(problem("profile.rank", keys.rank, wrong, f"use at most {world_size - 1}"))
    return found
