"""The life of one SPMD process: joining the world, asking whether to stop, leaving it.

    with start(device="auto", timeout_seconds=1800) as process:
        for step in range(steps):
            ...
            if process.should_stop():
                break

How it ends when something goes wrong is `mesh/lifecycle/guard.py`.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mesh.lifecycle.ending import restart_count, under_torchrun, write_error_files
from mesh.lifecycle.guard import Guard

REFUSAL_SECONDS = 5.0  # a launcher ends all ranks when one leaves: the one that prints goes first


@dataclass
class Process:
    """One rank of the world. `cpu_group` is a gloo group of all ranks for metadata; `closers` are
    called before the process groups go.

    As a context manager: a clean end destroys the process groups; an exception ends every rank of
    the world within seconds, non-zero, and the first exception is the last thing printed.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    cpu_group: dist.ProcessGroup
    guard: Guard
    closers: list[Callable[[], None]] = field(default_factory=list)

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop (Ctrl-C, SIGTERM). Collective: the same on all.

        Until a program has called this, a first Ctrl-C ends it at once: nobody would obey. After
        True it has all the time that its launcher gives it (torchrun: 30 s).
        """
        flag = torch.tensor(int(self.guard.stop_requested))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.cpu_group)
        self.guard.told(stop=bool(flag))
        return bool(flag)

    def listen(self) -> None:
        """From now on a first request to stop is obeyed at the next `should_stop`."""
        self.guard.told(stop=False)

    def from_rank0(self, value: Any) -> Any:
        """Rank 0's value of a small picklable object, on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value of a small picklable object, by rank, on every rank. Collective."""
        boxes = [None] * self.world_size
        dist.all_gather_object(boxes, value, group=self.cpu_group)
        return boxes

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
        return self.from_rank0(sys.stdin.read().splitlines() if self.rank == 0 else None)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = error is not None and not (isinstance(error, SystemExit) and not error.code)
        if error is not None and failed and self.world_size > 1:
            self.guard.fail(error)
        if error is not None and failed:
            write_error_files(error, self.rank, self.guard.run_dir)
        self.guard.leave(exit_code=1 if failed else 0)
        for close in self.closers:
            close()
        dist.destroy_process_group()
        self.guard.close()


def start(
    device: str = "auto", timeout_seconds: float = 1800, stall_seconds: float = 900
) -> Process:
    """Join the world that the launcher describes in the environment (torchrun's variables), or
    make a world of one where there is no launcher.

    `device` is auto, cpu or cuda; a collective that takes longer than `timeout_seconds` ends the
    run, and so does a world in which no rank has got on for `stall_seconds` (0: never). Raises
    ValueError where the device is not there.
    """
    _be_a_world_of_one_without_launcher()
    _refuse_restarts_of_many_machines()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = _choose_device(device, local_rank)
    _limit_threads(chosen, local_world_size)

    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    _join_world(backend, timeout)
    cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    first_local = rank - local_rank
    local_peers = [r for r in range(first_local, first_local + local_world_size) if r != rank]
    guard = Guard(rank, world_size, local_peers, stall_seconds)
    return Process(rank, world_size, local_rank, chosen, cpu_group, guard)


def _join_world(backend: str, timeout: timedelta) -> None:
    """`init_process_group`, with keys of its own at each attempt: torchrun's store outlives a
    restart, and torch 2.13 would find the addresses of dead processes in it."""
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    mine = dist.PrefixStore(f"attempt-{restart_count()}", store)
    dist.init_process_group(backend, store=mine, rank=rank, world_size=world_size, timeout=timeout)


def refuse_to_start(error: ValueError) -> NoReturn:
    """End this process over a command line that cannot run, before there is a world to tell.

    Every rank reads the same words, so the first one prints for all; torchrun's summary gets the
    error from whichever rank it names.
    """
    rank = int(os.environ.get("RANK", "0"))
    write_error_files(error, rank, None)
    if rank == 0:
        print(f"ValueError: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(REFUSAL_SECONDS)
    sys.exit(1)


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
        raise ValueError(
            f"--max-restarts={restarts} works on one machine only; leave it out, and start again "
            "with resume=RUN_DIR"
        )


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ValueError(
            f"device={device}: local rank {local_rank} has no GPU of its own, {count} are there; "
            f"start at most {count} processes per host, or set device=cpu"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def _limit_threads(device: torch.device, local_world_size: int) -> None:
    """One thread where the model runs on the CPU, as torchrun has it for several processes: threads
    that wait for each other make a small model's operators many times slower. Else an equal share
    of the cores. OMP_NUM_THREADS is what a user says otherwise with.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
        num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, num_cores // local_world_size))
