"""Scripts that a process of the mesh runs in its main thread, and how they ended."""

from __future__ import annotations

import os
import queue
import runpy
import sys
import threading
import traceback
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A script with its arguments, working directory and environment variables."""

    argv: list[str]
    directory: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: the `status` of its script, or the `death` of its process.

    `killed`: the process did not end by itself.
    """

    rank: int
    status: int | None = None
    death: str = ""
    killed: bool = False


jobs: queue.Queue[tuple[Job, queue.Queue[int]] | None] = queue.Queue()
"""Jobs for the main thread, each with a queue for its exit status; None: there are no more."""
running = threading.Event()
"""Set while the main thread runs a script."""


def execute(job: Job) -> int:
    """Run a script as `python SCRIPT WORDS` would; returns its exit status.

    An exception that the script does not catch ends the process.
    """
    os.environ.update(job.environment)
    os.chdir(job.directory)
    sys.argv[:] = job.argv
    sys.orig_argv[:] = [sys.executable, *job.argv]
    sys.path[0] = os.path.dirname(os.path.abspath(job.argv[0]))
    running.set()
    try:
        runpy.run_path(job.argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    finally:
        running.clear()
        sys.stdout.flush()
        sys.stderr.flush()
