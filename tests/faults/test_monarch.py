"""Real launches of tools/monarch.py: the run that torchrun makes, kept going, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from foreground import steps_of
from launching import REPOSITORY, Run, run
from test_resume import WORDS

from mesh.lifecycle.ending import alive
from mesh.runs.compare import untimed

if find_spec("monarch") is None:
    pytest.skip("torchmonarch is not installed", allow_module_level=True)

pytestmark = pytest.mark.timeout(1200)  # of a slow machine
STUB = "tests/programs/monarch_program.py"
GRPO = "recipes/grpo.py"
STEPS = 6
PATIENCE = 400  # seconds: the events that are waited for come, or something is broken


class Monarch:
    """A started launcher, as a terminal's foreground job. It notes all that it has started, and the
    ports on which it listens."""

    def __init__(self, *words: str) -> None:
        self.seen: set[int] = set()
        self.ports: set[int] = set()
        self.popen = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tools" / "monarch.py"), *words],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> set[int]:
        """Process ids of the processes of its mesh."""
        found: set[int] = set()
        for children in Path(f"/proc/{self.popen.pid}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread ended
                found |= set(map(int, children.read_text().split()))
        self.seen |= found
        return found

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.ranks()
            if self.popen.poll() is not None or time.monotonic() > deadline:
                self.popen.kill()
                raise AssertionError("\n".join(self.popen.communicate()))
            time.sleep(0.05)
        self.ports |= listening(self.popen.pid)

    def finish(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of its end, after which no process of it lives, and its
        ports are free."""
        try:
            out, err = self.popen.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise AssertionError("\n".join(self.popen.communicate())) from None
        wait_until_gone(self.seen)
        for port in self.ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        return self.popen.returncode, out, "\n".join(spoken(err))


def listening(pid: int) -> set[int]:
    """The TCP ports on which a process listens."""
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(descriptor))
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()]
    return {
        int(row[1].rpartition(":")[2], 16)
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in held
    }


def spoken(err: str) -> list[str]:
    monarchs_own = ("Monarch internal logs", "(bootstrap) PDEATHSIG disabled")
    return [line for line in err.splitlines() if line and not line.startswith(monarchs_own)]


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]


def lines_of(made: Run) -> list[dict[str, Any]]:
    """What each step's line says but for how long it took."""
    return [untimed(line) for line in made.metrics]


def pids_in(directory: Path) -> set[int]:
    """Those that the stub wrote down: `START-RANK-PID`."""
    return {int(path.name.split("-")[2]) for path in directory.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def last_words(tmp_path_factory) -> Iterator[tuple[Monarch, Path]]:
    """Started before the first test, because it mostly waits: 15 s for a rank that hangs."""
    path = tmp_path_factory.mktemp("last_words")
    job = Monarch(STUB, "procs=2", "restarts=1", str(path), "last words")
    yield job, path
    job.popen.kill()  # where its test did not run; nothing outlives it


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Run:
    """The run under torchrun that was never killed, and writes no checkpoint."""
    path = tmp_path_factory.mktemp("torchrun") / "run"
    return run(GRPO, path, 2, *WORDS, f"steps={STEPS}")


def test_killed_and_resumed_by_itself_is_the_run_under_torchrun(uninterrupted, tmp_path):
    """Steps 0 to 2 come from the first mesh, the rest from the second one."""
    path = tmp_path / "run"
    words = ["checkpoint.every=2", f"steps={STEPS}", f"run_dir={path}"]
    job = Monarch(GRPO, "procs=2", *WORDS, *words)
    job.wait_for(lambda: (path / "checkpoints" / "step-2").exists())
    first = job.ranks()
    assert len(first) == 2
    os.kill(max(first), signal.SIGKILL)
    job.wait_for(lambda: len(job.ranks() - first) == 2)
    status, out, err = job.finish()
    assert status == 0, err
    assert len(job.seen) == 4 and len(job.ports) >= 2  # of a store, of the lifelines
    cause = "killed, or crashed outside Python; restart 1 of 3, from"
    assert re.search(rf"^monarch: rank [01]: {cause} {path}/checkpoints/step-", err, re.M), err
    assert re.search(r"rank [01] \(process \d+\) was killed, or crashed", err)  # another rank's
    assert f"resumed from {path}/checkpoints/step-" in out
    assert f"attempt 2 continues, run_dir={path}" in out
    made = Run(path, out)
    assert lines_of(made) == lines_of(uninterrupted)
    assert made.samples == uninterrupted.samples
    models = [each.path / "model" / "model.safetensors" for each in (made, uninterrupted)]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_ends_the_run_after_its_step(number, uninterrupted, tmp_path):
    path = tmp_path / "run"
    words = [*WORDS, "checkpoint.every=1000", "steps=1000", f"run_dir={path}"]
    job = Monarch(GRPO, "procs=2", *words)
    metrics = path / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
    assert len(job.ranks()) == 2
    job.popen.send_signal(number)
    status, out, err = job.finish()
    assert status == 0, err
    last = steps_of(path)[-1]
    assert 2 <= last < 1000
    assert steps_of(path) == list(range(last + 1))
    assert f"to continue after step {last}: resume={path}" in out
    assert (path / "checkpoints" / f"step-{last}" / "index.json").exists()
    assert err.count("stopping at the end of this step; Ctrl-C again ends at once") == 1
    assert "restart" not in err
    both = min(last, STEPS)
    assert lines_of(Run(path, out))[1:both] == lines_of(uninterrupted)[1:both]


def test_a_second_ctrl_c_ends_at_once_what_ignores_the_first(tmp_path):
    """Both ranks, each with a child, ignore SIGTERM, until the launcher gets a Ctrl-C."""
    job = Monarch(STUB, "procs=2", str(tmp_path), "deaf")
    job.wait_for(lambda: len(pids_in(tmp_path)) == 4)
    job.popen.send_signal(signal.SIGTERM)
    job.wait_for(lambda: len(list(tmp_path.glob("heard-*"))) == 2)
    assert all(map(alive, pids_in(tmp_path)))
    job.popen.send_signal(signal.SIGINT)
    status, _, err = job.finish()
    assert status == 128 + signal.SIGTERM
    assert err == ""
    wait_until_gone(pids_in(tmp_path))


def test_a_refusal_is_not_retried(tmp_path):
    """A layout that the recipe's check refuses on all ranks."""
    run_dir = tmp_path / "run"
    job = Monarch(GRPO, "procs=2", "conf=qwen3_tiny", "trainer.tp=3", f"run_dir={run_dir}")
    status, _, err = job.finish()
    assert status == 1
    assert err.count("2 problems with the configuration") == 1
    last = err.splitlines()[-1]
    assert last.endswith(": left with status 2; it had not begun, so it is not started again")
    assert not run_dir.exists()


def test_own_words_are_refused_in_one_list():
    status, _, err = Monarch("recipes/grp.py", "procs=0", "restarts=x", "hosts=a").finish()
    assert status == 1
    assert len(err.splitlines()) == 5
    for word in ("recipes/grp.py: no such file", "procs=0: ", "restarts=x: ", "hosts=a: "):
        assert word in err


def test_every_process_is_started_as_torchrun_would(tmp_path):
    """Words that the recipe will refuse reach it as they are, and its status is the end."""
    given = [str(tmp_path), "report", "conf=qwen3_tiny", "stepz=3"]
    status, out, _ = Monarch(STUB, "procs=4", *given).finish()
    assert status == 3  # a script's own, of rank 1
    reports = sorted(map(json.loads, out.splitlines()), key=lambda report: report[0]["RANK"])
    assert len(reports) == 4
    for rank, (variables, words) in enumerate(reports):
        script = REPOSITORY / STUB
        started = [str(script.parent), "__main__", str(REPOSITORY), True]
        assert words == [[str(script), *given], *started]
        assert variables == {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4",
            "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
    wait_until_gone(pids_in(tmp_path))


def test_restarts_are_used_up(last_words):
    """At first the other rank hangs with a child: both are killed before there is a new mesh."""
    job, path = last_words
    status, _, err = job.finish()
    assert status == 1
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[::2] == ["the last words of start 0", "the last words of start 1"]
    assert lines[1] == "monarch: rank 1: left with status 7; restart 1 of 1, from the beginning"
    assert re.fullmatch(r"monarch: rank [01]: left with .*; restarts=1 are used up, .*", lines[3])
    assert sorted(note.name[:4] for note in path.iterdir()) == [
        "0-0-", "0-0-", "0-1-", "1-0-", "1-1-",
    ]  # fmt: skip
    wait_until_gone(pids_in(path))


def test_nothing_outlives_a_launcher_that_was_killed(tmp_path):
    job = Monarch(STUB, "procs=2", str(tmp_path), "sleep")
    job.wait_for(lambda: len(pids_in(tmp_path)) == 4)
    job.popen.kill()
    job.finish()
    wait_until_gone(pids_in(tmp_path))


@pytest.fixture(scope="module")
def hosts() -> Iterator[str]:
    """Two "hosts" on this machine."""
    addresses = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            addresses.append(f"127.0.0.1:{probe.getsockname()[1]}")
    served = [Monarch(f"serve={address}") for address in addresses]
    yield ",".join(addresses)
    for host in served:
        host.ranks()
        host.popen.kill()
        host.finish()


def test_two_hosts_with_a_restart(hosts, tmp_path):
    """Rank 1 is killed in its start, and rank 0 leaves right after it: it is no refusal."""
    words = ["procs=1", f"hosts={hosts}", "restarts=1", str(tmp_path), "once", "conf=qwen3_tiny"]
    status, out, err = Monarch(STUB, *words).finish()
    assert status == 0, err
    assert sorted(out.splitlines()) == ["rank 0 ends well", "rank 1 ends well"]
    cause = "rank 1: killed, or crashed outside Python"
    assert err.splitlines() == [f"monarch: {cause}; restart 1 of 1, from the beginning"]
    assert sorted(path.name[:4] for path in tmp_path.iterdir()) == ["0-0-", "0-1-", "1-0-", "1-1-"]
    wait_until_gone(pids_in(tmp_path))
