"""The data of the live page: read again when the runs have written, and when somebody looks.

Nobody looks: nothing is read. Somebody does: at most once in `every` seconds, and never for more
than a twentieth of the time, however large the run has become.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.report.build import report_data
from tools.report.html import embedded
from tools.report.options import Options
from tools.report.reading import MARKS

SHARE = 0.05  # of one core's time, the most that reading takes
GZIP_LEVEL = 3


@dataclass(frozen=True)
class Snapshot:
    """The data of one moment as JSON. The tag is a weak one: the compressed form has it, too."""

    body: bytes
    compressed: bytes
    etag: str

    @classmethod
    def of(cls, data: dict[str, Any]) -> Snapshot:
        body = embedded(data).encode()
        tag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
        return cls(body, gzip.compress(body, GZIP_LEVEL, mtime=0), tag)


class Feed:
    """Owns the newest snapshot of some runs. `now`: the clock; `busy`: that of the time for which
    this thread has had a core [s]."""

    def __init__(
        self,
        run_dirs: Sequence[Path],
        every: float,
        options: Options = Options(),  # noqa: B008
        now: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] = time.thread_time,
    ):
        self.readings = 0
        self._run_dirs, self._every, self._options = run_dirs, every, options
        self._now, self._busy = now, busy
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._seen: Any = None
        self._due = 0.0

    def latest(self) -> Snapshot:
        """The newest snapshot. One caller at a time reads; the others get the last one."""
        if self._lock.acquire(blocking=self._snapshot is None):
            try:
                if self._snapshot is None or self._now() >= self._due:
                    self._read()
            finally:
                self._lock.release()
        assert self._snapshot is not None
        return self._snapshot

    def _read(self) -> None:
        began = self._busy()
        seen = [(signature(path), is_locked(path)) for path in self._run_dirs]
        if seen != self._seen or self._snapshot is None:
            self._snapshot = Snapshot.of(self._data([locked for _, locked in seen]))
            self._seen = seen
            self.readings += 1
        taken = self._busy() - began
        self._due = self._now() + max(self._every, taken * (1 - SHARE) / SHARE)

    def _data(self, locked: Sequence[bool | None]) -> dict[str, Any]:
        """As tools/report has it, and `live`: what is known of each run beside it."""
        begun = {path: lock for path, lock in zip(self._run_dirs, locked, strict=True)
                 if has_begun(path)}  # fmt: skip
        data = report_data([*begun], self._options) if begun else nothing()
        done = [run["done"] for run in data["runs"]]
        waiting = [self._waiting_for(path) for path in self._run_dirs if path not in begun]
        live = {"every": self._every, "states": [*map(state, done, begun.values())]}
        return data | {"live": live | {"waiting": waiting}}

    def _waiting_for(self, path: Path) -> str:
        shown = path.name if "paths" in self._options.hide else path
        return f"{shown} {'holds no run' if path.exists() else 'does not exist'} yet."


def nothing() -> dict[str, Any]:
    """The data of a page before there is a run."""
    return {"version": 1, "made": "", "runs": [], "comparison": None}


def has_begun(path: Path) -> bool:
    return any((path / name).exists() for name in MARKS)


def state(done: bool, locked: bool | None) -> str:
    """`running`, `ended`: by itself, as it was asked to; `stopped`: it ended before that, or was
    killed; `unknown`: which of the two the file system cannot tell."""
    if locked or (locked is None and not done):
        return "running" if locked else "unknown"
    return "ended" if done else "stopped"


def is_locked(path: Path) -> bool | None:
    """True while a run writes there: it holds the lock of mesh/lifecycle/run_lock.py. Asking takes
    nothing from it: a shared lock for a moment, and a run that wants its own tries again. None: the
    file system has no locks."""
    try:
        file = os.open(path / "lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)


def signature(path: Path) -> list[tuple[str, int, int]]:
    """Names, times and sizes of what lies in a run directory; changes when the run writes."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return []
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in found]
