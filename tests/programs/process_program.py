"""A program for `test_process.py` to end: `torchrun process_program.py WHAT PID_DIR`."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mesh.config.keys import Refusal
from mesh.lifecycle.heartbeat import heartbeat
from mesh.lifecycle.process import Process, refuse_to_start, start
from mesh.lifecycle.timers import Phases
from mesh.runs.directory import create_run_dir

STEPS = 400


def say(text: str) -> None:
    sys.stdout.write(text + "\n")  # torchrun unbuffers: print would write the newline by itself
    sys.stdout.flush()


def in_collective(process: Process) -> None:
    dist.all_reduce(torch.ones(1))


def in_sleep(process: Process) -> None:
    while True:
        time.sleep(0.2)


def in_compute(process: Process) -> None:
    matrix = torch.randn(600, 600)
    while True:
        matrix = torch.mm(matrix, matrix).clamp(-1, 1)


def hold_the_gil(process: Process) -> None:
    """A deadlock in C code: unlike CDLL, PyDLL does not let the GIL go. It burns no core."""
    mutex = ctypes.create_string_buffer(64)  # zeros are an open one
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def stall(process: Process, how) -> None:
    """Rank 1 comes to a stop first; rank 0 soon waits for it."""
    process.guard.run_dir = "runs/example"
    Path("runs/example").mkdir(parents=True, exist_ok=True)
    for _ in range(10):
        heartbeat()
        time.sleep(0.1)
    if process.rank == 1:
        how(process)
    for _ in range(10):
        heartbeat()
        time.sleep(0.1)
    in_collective(process)


def raise_error() -> None:
    raise KeyError("the first error")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rank1_ends(process: Process, end) -> None:
    """The others sit where each kind of program sits: in a collective, in Python, in C code."""
    time.sleep(0.3)
    if process.rank == 1:
        end()
    {0: in_collective, 2: in_compute, 3: in_sleep}[process.rank](process)


def two_fail(process: Process) -> None:
    if process.rank == 0:
        time.sleep(0.4)  # within the time in which rank 1 settles: both errors are real
        raise RuntimeError("a later error")
    time.sleep(0.3)
    raise_error()


def all_fail(process: Process) -> None:
    raise ValueError("steps=-1: the same on all ranks")


def refuse() -> None:
    raise Refusal("seed=x: not one\n- so it is refused")


def all_refuse(process: Process) -> None:
    """In a directory that is there, where a crash would leave its traceback."""
    process.guard.run_dir = "."
    time.sleep(0.3 * process.rank)
    refuse()


def train(process: Process) -> None:
    for step in range(STEPS):
        time.sleep(0.05)
        if step == 5 and process.rank == 0:
            say("running")
        if process.should_stop():
            break
    say(f"rank {process.rank} stopped at step {step}")


def asked_on_all_ranks(process: Process) -> None:
    """A rank may leave the first call before another one does, whose guard then obeys no request:
    the second call waits for all."""
    process.should_stop()
    process.should_stop()


def train_slowly(process: Process) -> None:
    process.guard.run_dir = "runs/example"
    asked_on_all_ranks(process)
    if process.rank == 0:
        say("running")
    in_compute(process)


def export(process: Process) -> None:
    """Stops when asked to, and then needs longer than a step may."""
    asked_on_all_ranks(process)
    if process.rank == 0:
        say("running")
    while not process.should_stop():
        time.sleep(0.05)
    time.sleep(3)
    say(f"rank {process.rank} saved")


def never_ask(process: Process) -> None:
    process.guard.run_dir = "runs/example"
    if process.rank == 0:
        say("running")
    in_compute(process)


def finish(process: Process) -> None:
    phases = Phases(process.device)
    with phases("wait"):
        time.sleep(0.1 * process.rank)
    slowest = phases.seconds(process.cpu_group)["wait"]
    run_dir = create_run_dir(process, None, "tiny", "seed: 0\n")
    try:
        create_run_dir(process, run_dir, "tiny", "seed: 1\n")
    except ValueError as error:
        refusal = error
    say(f"{process.from_rank0(process.rank + 7)} {0.1 < slowest < 1} {run_dir} {refusal}")
    time.sleep(0.5 * process.rank)


WHAT = {
    "error": lambda process: rank1_ends(process, raise_error),
    "killed": lambda process: rank1_ends(process, be_killed),
    "two-fail": two_fail,
    "all-fail": all_fail,
    "one-refuses": lambda process: rank1_ends(process, refuse),
    "all-refuse": all_refuse,
    "stall": lambda process: stall(process, in_sleep),
    "stall-with-gil": lambda process: stall(process, hold_the_gil),
    "train": train,
    "train-slowly": train_slowly,
    "export": export,
    "never-ask": never_ask,
    "finish": finish,
}


if __name__ == "__main__":
    stall_seconds = 3 if sys.argv[1].startswith("stall") else 900
    if sys.argv[1] == "export":  # a step has 1 s; torchrun, which read it before, has its own
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "6"
    if sys.argv[1] == "refuse-early":
        Path(sys.argv[2], str(os.getpid())).touch()
        try:
            refuse()
        except Refusal as refusal:
            refuse_to_start(refusal)
    with start("cpu", 120, stall_seconds) as process:
        Path(sys.argv[2], str(os.getpid())).touch()
        process.gather(None)  # a barrier: every rank has its signal handlers
        WHAT[sys.argv[1]](process)
