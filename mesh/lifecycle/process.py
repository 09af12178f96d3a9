"""The life of one SPMD process: joining the world, asking whether to stop, leaving it.

    with start(device="auto", timeout_seconds=1800) as process:
        for step in range(steps):
            ...
            if process.should_stop():
                break

The end after a failure is `mesh/lifecycle/guard.py`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mesh.config.keys import Refusal, problem
from mesh.lifecycle.ending import restart_count, say, under_torchrun, write_error_files
from mesh.lifecycle.guard import REFUSED, Guard
from mesh.lifecycle.run_lock import RunLock

MEET_SECONDS = 60.0  # the longest that ranks which refuse to start wait for each other


@dataclass
class Process:
    """One rank of the world. `cpu_group` is a gloo group of all ranks for metadata; `closers` are
    called before the process groups are destroyed; `lock`: rank 0's, of the run directory.

    As a context manager: a clean end destroys the process groups; an exception ends every rank of
    the world within seconds, non-zero, and the first exception is the last thing printed. Of a
    Refusal the message alone is printed, once, and the status is `REFUSED`.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    cpu_group: dist.ProcessGroup
    guard: Guard
    closers: list[Callable[[], None]] = field(default_factory=list)
    lock: RunLock = field(default_factory=RunLock)

    def should_stop(self) -> bool:
        """True where any rank was asked to stop (Ctrl-C, SIGTERM). Collective: the same on all.

        Until a program has called this, a first Ctrl-C ends it at once: nothing would obey. After
        True it has all the time that its launcher gives it (torchrun: 30 s).
        """
        flag = torch.tensor(int(self.guard.stop_requested))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.cpu_group)
        self.guard.agreed(stop=bool(flag))
        return bool(flag)

    def listen(self) -> None:
        """Have a first request to stop obeyed at the next `should_stop` from now on."""
        self.guard.agreed(stop=False)

    def from_rank0(self, value: Any) -> Any:
        """Rank 0's value of a small picklable object, on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value of a small picklable object, by rank, on every rank. Collective."""
        boxes: list[Any] = [None] * dist.get_world_size(self.cpu_group)
        dist.all_gather_object(boxes, value, group=self.cpu_group)
        return boxes

    def to_rank0(self, value: Any) -> list[Any]:
        """Every rank's value of a picklable object, by rank, on rank 0; nothing elsewhere.
        Collective."""
        boxes: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, boxes, dst=0, group=self.cpu_group)
        return boxes or []

    def say(self, text: str) -> None:
        """Rank 0 prints; every rank may call."""
        if self.rank == 0:
            print(text, flush=True)

    def write(self, path: Path, text: str) -> None:
        """Rank 0 writes a file; every rank may call."""
        if self.rank == 0:
            path.write_text(text)

    def read_lines(self) -> list[str]:
        """The lines of rank 0's stdin, on every rank. Collective."""
        return self.from_rank0(sys.stdin.read().split("\n") if self.rank == 0 else None)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        refused = isinstance(error, Refusal)
        failed = error is not None and not (isinstance(error, SystemExit) and not error.code)
        launched = self.world_size > 1 or (refused and under_torchrun())
        if error is not None and failed and launched:
            self.guard.fail(error)
        if error is not None and failed and not refused:
            write_error_files(error, self.rank, self.guard.run_dir)
            if outlook := self.guard.save():
                error.add_note(outlook)
        self.guard.leave(exit_code=REFUSED if refused else int(failed))
        for close in self.closers:
            close()
        self.lock.release()
        dist.destroy_process_group()
        self.guard.close()
        if refused:
            say(str(error))
            sys.exit(REFUSED)


def start(
    device: str = "auto", timeout_seconds: float = 1800, stall_seconds: float = 900
) -> Process:
    """Join the world that the launcher describes in the environment (torchrun's variables), or
    make a world of one where there is no launcher.

    `device` is auto, cpu or cuda; a collective that takes longer than `timeout_seconds` ends the
    run, and so does a world in which no rank records a heartbeat for `stall_seconds` (0: never).
    Where the device is missing, or restarts cannot work, `refuse_to_start` ends the program here.
    """
    _be_a_world_of_one_without_launcher()
    place = Place.of_environment()
    try:
        _refuse_restarts_of_many_machines()
        chosen = _choose_device(device, place)
    except Refusal as refusal:
        refuse_to_start(refusal)
    _limit_threads(chosen, len(place.local_ranks))

    timeout = timedelta(seconds=timeout_seconds)
    _join_world("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout)
    cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    guard = Guard(place.rank, place.world_size, place.local_ranks, stall_seconds)
    return Process(place.rank, place.world_size, place.local_rank, chosen, cpu_group, guard)


def refuse_to_start(refusal: Refusal) -> NoReturn:
    """End this process over a command line that cannot run, before there is a process group.

    Every rank reads the same command line and comes here, so that one of them prints the message.
    Under torchrun one rank of each machine exits with `REFUSED` and the others with 0: torchrun
    still fails, and its summary has one rank instead of all.
    """
    alone = "RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1"
    if alone and not under_torchrun():
        say(str(refusal))
        sys.exit(REFUSED)
    place = Place.of_environment()
    timeout = timedelta(seconds=MEET_SECONDS)
    _store = next(dist.rendezvous("env://", timeout=timeout))  # where the launcher has none, ours
    guard = Guard(place.rank, place.world_size, place.local_ranks, stall_seconds=0)
    status = guard.settle(refusal)
    if under_torchrun():
        os._exit(status)  # the interpreter's own teardown takes seconds, for which others wait
    sys.exit(status)


@dataclass(frozen=True)
class Place:
    """This rank, the world and the ranks of this machine, from the launcher's environment."""

    rank: int
    world_size: int
    local_rank: int
    local_ranks: range

    @classmethod
    def of_environment(cls) -> Place:
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
        first, count = rank - local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        world_size = int(os.environ["WORLD_SIZE"])
        return cls(rank, world_size, local_rank, range(first, first + count))


def _join_world(backend: str, timeout: timedelta) -> None:
    """`init_process_group`, with keys of its own at each attempt: torchrun's store outlives a
    restart, and torch 2.13 would find the addresses of dead processes in it."""
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    mine = dist.PrefixStore(f"attempt-{restart_count()}", store)
    dist.init_process_group(backend, store=mine, rank=rank, world_size=world_size, timeout=timeout)


def _be_a_world_of_one_without_launcher() -> None:
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)


def _refuse_restarts_of_many_machines() -> None:
    """Each of torchrun's agents counts restarts by itself, and not those that a peer's failure
    brings: the processes of two machines could not tell which attempt they are in."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if under_torchrun() and restarts != "0" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise Refusal(
            f"--max-restarts={restarts} works on one machine only; leave it out, and start again "
            "with resume=RUN_DIR"
        )


def _choose_device(device: str, place: Place) -> torch.device:
    """The device of this rank. Raises the same Refusal on all ranks of a machine."""
    found = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not found):
        return torch.device("cpu")
    if not found:
        remedy = "set device=cpu, or install a CUDA build of torch"
        raise Refusal(problem("device", device, "torch finds no CUDA device here", remedy))
    processes = max(len(place.local_ranks), place.local_rank + 1)
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise Refusal(
            f"{processes} processes on this machine, which has {gpus} GPUs; "
            f"start at most {gpus}, or set device=cpu"
        )
    chosen = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def _limit_threads(device: torch.device, local_world_size: int) -> None:
    """Use one thread where the model runs on the CPU, as torchrun does for several processes:
    threads that wait for each other make a small model's operators many times slower. On a GPU use
    an equal share of the cores. OMP_NUM_THREADS overrides both.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
        num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, num_cores // local_world_size))
