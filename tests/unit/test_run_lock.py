"""The lock of a run directory: one process at a time, and none that a fork or a kill leaves behind.

Whole runs: faults/test_two_runs.py.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from errno import ENOLCK
from pathlib import Path

import pytest

from mesh.config.keys import Refusal
from mesh.lifecycle import run_lock
from mesh.lifecycle.process import Process
from mesh.lifecycle.run_lock import LOCK, RunLock
from mesh.runs.directory import create_run_dir

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from mesh.lifecycle.run_lock import RunLock
print(RunLock().take("run_dir", Path(sys.argv[1])) or "locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=-1, text=True
    ) as it:
        assert it.stdout is not None and it.stdout.readline() == "locked\n"
        yield it
        it.kill()


def test_a_second_process_is_refused_with_the_first_s_host_and_pid(
    process: Process, tmp_path, holder, monkeypatch
):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.2)
    for resume, key in ((True, "resume"), (False, "run_dir")):
        with pytest.raises(Refusal) as caught:
            create_run_dir(process, tmp_path, "tiny", "", resume)
        first, last = str(caught.value).split(", since ")
        assert first == (
            f"{key}={tmp_path}: another run writes to this directory "
            f"(host {socket.gethostname()}, pid {holder.pid}"
        )
        assert last.endswith("); wait until it has ended, or end it, or name another directory")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK], "nothing was written"


def test_a_killed_process_leaves_the_lock_at_once_and_one_that_ends_soon_is_waited_for(
    tmp_path, holder
):
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -{signal.SIGKILL} {holder.pid}"])
    began = time.monotonic()
    assert RunLock().take("resume", tmp_path) == ""
    assert 0.3 < time.monotonic() - began < run_lock.WAIT_SECONDS


def test_a_run_releases_it_at_its_end_and_asks_for_it_twice(process: Process, tmp_path):
    for _ in range(2):
        assert process.lock.take("run_dir", tmp_path) == ""
    process.lock.release()
    assert RunLock().take("resume", tmp_path) == ""


def test_forked_and_executed_children_do_not_keep_it(tmp_path, monkeypatch):
    """Both outlive the run here, as a child of user code may."""
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.2)
    mine = RunLock()
    assert mine.take("run_dir", tmp_path) == ""
    executed = subprocess.Popen(["sleep", "60"], close_fds=False)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.2)  # until the child has closed its copy
        assert "another run" in RunLock().take("run_dir", tmp_path), "the parent still has it"
        mine.release()
        assert RunLock().take("run_dir", tmp_path) == ""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        executed.kill()
        executed.wait()


def test_a_file_system_without_locks_is_a_warning(process: Process, tmp_path, capsys, monkeypatch):
    def unsupported(file: int, how: int) -> None:
        raise OSError(ENOLCK, os.strerror(ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    create_run_dir(process, tmp_path / "run", "tiny", "steps: 1\n")
    said = capsys.readouterr().out
    assert said.count("warning: the file system of") == 1 and "has no locks (No locks avail" in said
    assert Path(tmp_path, "run", "config.yaml").read_text() == "steps: 1\n"


def test_a_full_disk_does_not_end_the_run_at_its_lock(tmp_path):
    """A limit on the size of files stands for the full disk; the lock holds all the same."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    lock = RunLock()
    try:
        assert lock.take("run_dir", tmp_path) == ""
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / LOCK).read_text() == ""
    with open(tmp_path / LOCK) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "elsewhere")
    assert "its lock cannot be opened" in RunLock().take("resume", tmp_path / "run")
    assert not (tmp_path / "elsewhere").exists()
