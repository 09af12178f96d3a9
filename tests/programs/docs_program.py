"""Runs commands of the documentation one after another, each in a fork of a process that has
imported torch and the recipes' library once: `docs_program.py JOBS.json`.

A job is the program's path or module, its words, environment and working directory; what it prints
goes to `output`. The fork runs it as `python PROGRAM WORDS` would, as a world of one.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # imported once, for all jobs

import mesh.checkpoint.keeper  # noqa: F401
import mesh.program.assembly  # noqa: F401


def main(path: Path) -> None:
    jobs = json.loads(path.read_text())
    statuses = [status_of(job) for job in jobs]
    path.write_text(json.dumps(statuses))


def status_of(job: dict[str, Any]) -> int:
    """The exit status of one job, run in a fork."""
    child = os.fork()
    if child == 0:
        os._exit(run(job))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(job: dict[str, Any]) -> int:
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    sys.argv = [job["program"], *job["words"]]
    sys.path[:0] = job["path"]
    try:
        if job["module"]:
            runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(job["program"]).parent))
            runpy.run_path(job["program"], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main(Path(sys.argv[1]))
