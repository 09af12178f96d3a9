"""The lock of a run directory: one run at a time writes there.

Two runs in one directory would overwrite each other's logs and checkpoints, and both would end
well. So rank 0 holds an exclusive flock(2) on RUN_DIR/lock for the length of the run. The kernel
drops it with the process, however that ends; a child that a fork makes closes its copy. The file
stays: removing it would let a third process lock another file of the same name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from mesh.config.keys import problem
from mesh.lifecycle.ending import restart_count

LOCK = "lock"
WAIT_SECONDS = 5.0  # a process that was killed may still be on its way out
RESTART_SECONDS = 30.0  # the same, of the attempt before: torchrun has signalled it
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """Owns the locks of the run directories of one process, which usually has one. `warning`: of a
    file system without locks.
    """

    def __init__(self) -> None:
        self.warning = ""
        self._files: dict[Path, int] = {}
        os.register_at_fork(after_in_child=self.release)

    def take(self, key: str, run_dir: Path) -> str:
        """Lock `run_dir`, waiting a few seconds for another process to leave; the problem where it
        does not, empty if the lock is ours, or was before. key: that named the directory.
        """
        if run_dir.absolute() in self._files:
            return ""
        try:
            file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            wrong = f"its lock cannot be opened ({error.strerror}: {error.filename})"
            return problem(key, run_dir, wrong, "make the directory one that you can write")
        try:
            if not _locked(file, RESTART_SECONDS if restart_count() else WAIT_SECONDS):
                holder = _holder(file)
                os.close(file)
                wrong = f"another run writes to this directory ({holder})"
                remedy = "wait until it has ended, or end it, or name another directory"
                return problem(key, run_dir, wrong, remedy)
        except OSError as error:
            os.close(file)
            if error.errno not in UNSUPPORTED:
                raise
            self.warning = (
                f"warning: the file system of {run_dir} has no locks ({error.strerror}): nothing "
                "keeps a second run from writing there; start none while this one runs"
            )
            return ""
        self._files[run_dir.absolute()] = file
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without our name in it
            os.ftruncate(file, 0)
            os.pwrite(file, (json.dumps(mine) + "\n").encode(), 0)
        return ""

    def release(self) -> None:
        """Let others have the directories: close our descriptors. In a forked child the parent's
        stay open, and with them its locks.
        """
        while self._files:
            os.close(self._files.popitem()[1])


def _locked(file: int, seconds: float) -> bool:
    """Try to lock an open file for so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.1)


def _holder(file: int) -> str:
    """The process that wrote itself into the lock."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return f"host {found['host']}, pid {found['pid']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "which process is not known"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
