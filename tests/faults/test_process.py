"""How a program of several ranks ends, with real torchrun launches of `process_program.py`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mesh.lifecycle.ending import alive
from mesh.lifecycle.process import start

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "tests" / "programs" / "process_program.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
STOPPING = "stopping at the end of this step; Ctrl-C again ends at once"


class Launch:
    """A started program, in a session of its own as a terminal's foreground job would be."""

    def __init__(self, what: str, num_ranks: int, directory: Path, *more: str, **environment: str):
        """`more`: torchrun's own arguments."""
        launcher = [*TORCHRUN, "--rdzv-endpoint=127.0.0.1:0", f"--nproc-per-node={num_ranks}"]
        launcher += more
        self.pid_dir = directory / "pids"
        self.pid_dir.mkdir()
        self.popen = subprocess.Popen(
            [*(launcher if num_ranks else [sys.executable]), str(PROGRAM), what, str(self.pid_dir)],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_until_running(self) -> None:
        assert self.popen.stdout.readline() == "running\n"

    def wait_for_pids(self, count: int) -> None:
        while len(list(self.pid_dir.iterdir())) < count:
            assert self.popen.poll() is None, self.popen.communicate()[1]
            time.sleep(0.05)

    def press_ctrl_c(self) -> None:
        os.killpg(self.popen.pid, signal.SIGINT)

    def finish(self, num_ranks: int) -> tuple[int, str, str, float]:
        """Exit status, stdout, stderr and the seconds that the end took; no process survives."""
        began = time.monotonic()
        out, err = self.popen.communicate(timeout=120)  # of a busy machine
        pids = [int(path.name) for path in self.pid_dir.iterdir()]
        assert len(pids) == num_ranks
        while any(map(alive, pids)) and time.monotonic() < began + 60:
            time.sleep(0.05)  # a rank closes its streams before it leaves
        assert not any(map(alive, pids))
        return self.popen.returncode, out, err, time.monotonic() - began


@pytest.fixture(scope="module", autouse=True)
def stall_with_gil(tmp_path_factory) -> Iterator[tuple[Launch, Path]]:
    """Started before the first test and looked at in the last one, because it mostly waits: what
    holds the GIL hears no SIGTERM, and torchrun kills it after 30 s."""
    directory = tmp_path_factory.mktemp("stall_with_gil")
    launch = Launch("stall-with-gil", 2, directory)
    yield launch, directory
    if launch.popen.poll() is None:  # that test did not run
        launch.popen.kill()
        for path in launch.pid_dir.iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)


def before_summary(err: str) -> str:
    """What the ranks printed: torchrun logs and prints its summary after that."""
    ours = err.split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    noise = ("W1", "W0", "E1", "E0")
    text = "\n".join(line for line in ours.splitlines() if not line.startswith(noise))
    return text.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0].rstrip()


def test_exception_on_one_rank_ends_all_and_is_printed_last(tmp_path):
    launch = Launch("error", 4, tmp_path)
    launch.wait_for_pids(4)
    status, _, err, seconds = launch.finish(4)
    assert status != 0
    assert seconds < 30
    assert before_summary(err).endswith("KeyError: 'the first error'")
    assert before_summary(err).count("Traceback") == 1
    assert "rank 1 failed at 20" in err
    root_cause = err.split("Root Cause")[1]
    assert "rank      : 1" in root_cause
    assert "KeyError: 'the first error'" in root_cause


def test_killed_rank_ends_all(tmp_path):
    launch = Launch("killed", 3, tmp_path)
    launch.wait_for_pids(3)
    status, _, err, seconds = launch.finish(3)
    assert status != 0
    assert seconds < 30
    assert before_summary(err).endswith("was killed, or crashed outside Python")
    assert "rank 1 (process" in before_summary(err).splitlines()[-1]


def test_later_error_is_printed_before_the_first(tmp_path):
    status, _, err, _ = Launch("two-fail", 2, tmp_path).finish(2)
    assert status != 0
    assert "rank 0 failed too:\nTraceback" in err
    assert err.index("RuntimeError: a later error") < err.index("rank 1 failed at")
    assert before_summary(err).endswith("KeyError: 'the first error'")


def assert_stalled(launch: Launch, directory: Path, where: str) -> None:
    """It ends with the stacks of both ranks, of which rank 1 is the one to look at."""
    launch.wait_for_pids(2)
    status, _, err, _ = launch.finish(2)
    assert status != 0
    assert f"in {where}\n" in err
    assert "in in_collective\n" in err
    last = before_summary(err).splitlines()[-1]
    assert "no rank recorded a heartbeat for stall_seconds=3." in last
    assert re.search(r"Silent, the longest first: rank 1 for \d+ s, rank 0 for", last)
    stack = (directory / "runs" / "example" / "stack-rank0.txt").read_text()
    assert "in in_collective\n" in stack


def test_stalled_rank_ends_all_with_their_stacks(tmp_path):
    assert_stalled(Launch("stall", 2, tmp_path), tmp_path, "in_sleep")


def test_same_error_on_all_ranks_is_printed_once(tmp_path):
    status, _, err, _ = Launch("all-fail", 2, tmp_path).finish(2)
    assert status != 0
    assert before_summary(err).count("ValueError: steps=-1: the same on all ranks") == 1


REFUSAL = "seed=x: not one\n- so it is refused"


@pytest.mark.parametrize(
    ("what", "num_ranks", "restarts"),
    [
        ("refuse-early", 2, 1),
        ("all-refuse", 3, 0),
        ("all-refuse", 1, 1),
        ("one-refuses", 2, 0),
    ],
)
def test_a_refusal_is_printed_once_and_fails_one_rank(tmp_path, what, num_ranks, restarts):
    """Without a traceback of ours and without files; torchrun adds its summary of one rank."""
    launch = Launch(what, num_ranks, tmp_path, f"--max-restarts={restarts}")
    status, _, err, _ = launch.finish(num_ranks * (restarts + 1))
    assert status != 0 and before_summary(err) == REFUSAL
    assert err.count("not one") == err.count("Traceback") == 1  # torchrun's
    assert "<NO_OTHER_FAILURES>" in err and "exitcode  : 2" in err and "SIGTERM" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["pids"]


@pytest.mark.parametrize("what", ["refuse-early", "all-refuse"])
def test_a_refusal_without_launcher_is_its_message_and_status_2(tmp_path, what):
    status, out, err, _ = Launch(what, 0, tmp_path).finish(1)
    assert (status, out, err) == (2, "", REFUSAL + "\n")


def test_clean_end_and_what_the_ranks_agree_on(tmp_path):
    status, out, err, _ = Launch("finish", 2, tmp_path).finish(2)
    assert (status, err) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    refused = f"run_dir=runs/{run_dir.name}: already holds a run (config.yaml)"
    assert out.count(f"7 True runs/{run_dir.name} {refused}") == 2
    assert (run_dir / "config.yaml").read_text() == "seed: 0\n"
    ranks = json.loads((run_dir / "environment.json").read_text())["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]


def test_ctrl_c_stops_all_ranks_after_the_same_step(tmp_path):
    launch = Launch("train", 2, tmp_path)
    launch.wait_until_running()
    launch.press_ctrl_c()
    _, out, err, seconds = launch.finish(2)
    lines = sorted(out.splitlines())
    assert [line.split(" stopped")[0] for line in lines] == ["rank 0", "rank 1"]
    steps = {int(line.rsplit(" ", 1)[1]) for line in lines}
    assert len(steps) == 1
    assert 5 <= steps.pop() < 399
    assert err.count(STOPPING) == 1
    assert seconds < 30


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    launch = Launch("train", 2, tmp_path)
    launch.wait_until_running()
    os.kill(int(next(launch.pid_dir.iterdir()).name), signal.SIGTERM)
    status, out, _, seconds = launch.finish(2)
    assert status == 0
    assert len({line.rsplit(" ", 1)[1] for line in out.splitlines()}) == 1
    assert len(out.splitlines()) == 2
    assert seconds < 30


@pytest.mark.parametrize("num_ranks", [0, 2])
@pytest.mark.parametrize("seconds_between", [0.25, 2.0])
def test_second_ctrl_c_ends_at_once_and_says_where_the_run_lies(
    tmp_path, num_ranks, seconds_between
):
    """torchrun passes the first one on as SIGINT and the second one as SIGTERM."""
    launch = Launch("train-slowly", num_ranks, tmp_path)
    launch.wait_until_running()
    launch.press_ctrl_c()
    time.sleep(seconds_between)
    launch.press_ctrl_c()
    status, _, err, seconds = launch.finish(max(num_ranks, 1))
    assert status != 0
    assert err.count("stopped: ended at once; run directory: runs/example") == 1
    assert err.index(STOPPING) < err.index("stopped: ended at once")
    assert seconds < 20  # the step has 25 s under torchrun


def test_a_wrapper_that_repeats_ctrl_c_is_heard_once(tmp_path):
    """As where a terminal signals both, and the wrapper passes it on."""
    launch = Launch("train", 0, tmp_path)
    launch.wait_until_running()
    launch.press_ctrl_c()
    launch.popen.send_signal(signal.SIGINT)
    launch.popen.send_signal(signal.SIGTERM)
    status, out, err, _ = launch.finish(1)
    assert status == 0
    assert out.startswith("rank 0 stopped at step")
    assert err == STOPPING + "\n"


def test_two_signals_to_one_rank_end_all_at_once(tmp_path):
    launch = Launch("train-slowly", 2, tmp_path)
    launch.wait_until_running()
    pid = int(next(launch.pid_dir.iterdir()).name)
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
    status, _, err, seconds = launch.finish(2)
    assert status != 0
    assert err.count("stopped: ended at once; run directory: runs/example") == 1
    assert "failed at" not in err
    assert seconds < 20


def test_step_is_abandoned_before_torchrun_kills(tmp_path):
    launch = Launch("train-slowly", 2, tmp_path, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="12")
    launch.wait_until_running()
    launch.press_ctrl_c()
    _, _, err, seconds = launch.finish(2)
    assert "stopped: the step did not end in time; run directory: runs/example" in err
    assert "SIGKILL" not in err
    assert 5 < seconds < 12


@pytest.mark.parametrize("num_ranks", [0, 2])
def test_program_that_never_asks_ends_at_the_first_ctrl_c(tmp_path, num_ranks):
    launch = Launch("never-ask", num_ranks, tmp_path)
    launch.wait_until_running()
    launch.press_ctrl_c()
    status, _, err, seconds = launch.finish(max(num_ranks, 1))
    assert status != 0
    assert err.count("stopped: ended at once; run directory: runs/example") == 1
    assert STOPPING not in err
    assert seconds < 30


def test_what_follows_the_stop_has_the_time_that_torchrun_gives(tmp_path):
    """A step has 1 s here after Ctrl-C, the export takes 3 s, torchrun's patience is 30 s."""
    launch = Launch("export", 2, tmp_path)
    launch.wait_until_running()
    launch.press_ctrl_c()
    _, out, err, _ = launch.finish(2)
    assert sorted(out.splitlines()) == ["rank 0 saved", "rank 1 saved"]
    assert f"{STOPPING}; torchrun kills what still runs after TORCH_ELASTIC" in err
    assert "stopped:" not in err


def test_ranks_do_not_outlive_torchrun(tmp_path):
    launch = Launch("train-slowly", 2, tmp_path)
    launch.wait_until_running()
    launch.popen.kill()
    _, _, err, seconds = launch.finish(2)
    assert "rank 0 ends: torchrun is gone" in err
    assert seconds < 30


def test_one_process_without_launcher(tmp_path):
    launch = Launch("train", 0, tmp_path)
    launch.wait_until_running()
    launch.press_ctrl_c()
    status, out, err, _ = launch.finish(1)
    assert status == 0
    assert out.startswith("rank 0 stopped at step")
    assert err == STOPPING + "\n"


def test_world_of_one_gives_everything_back(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError, match="inside"), start(device="cpu") as process:
        assert (process.rank, process.world_size, process.device) == (0, 1, torch.device("cpu"))
        assert process.from_rank0({"a": 1}) == {"a": 1}
        assert not process.should_stop()
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.should_stop()
        raise KeyError("inside")
    assert signal.getsignal(signal.SIGINT) is before
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_missing_gpu_is_refused(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as caught:
        start(device="cuda")
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "device=cuda: torch finds no CUDA device here; set device=cpu, or install a CUDA build of "
        "torch\n"
    )


def test_stalled_rank_that_holds_the_gil_ends_all_with_their_stacks(stall_with_gil):
    assert_stalled(*stall_with_gil, "hold_the_gil")
