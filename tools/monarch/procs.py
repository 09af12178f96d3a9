"""The door to Monarch: processes on one or several hosts, each of which runs a script.

Monarch calls actors on threads of their own. A recipe needs the main thread, which alone can handle
signals, so a process of the mesh has `process.py` as its program: Monarch's loop runs in a thread,
and an endpoint hands the script to the main thread. Everything else is as under torchrun.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading

os.environ.setdefault("HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY", "1s")  # 10 s to see a death

import monarch.actor
from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError
from monarch.actor import (
    Actor,
    attach_to_workers,
    default_bootstrap_cmd,
    enable_transport,
    endpoint,
    run_worker_loop_forever,
    this_host,
)

from tools.monarch.jobs import Ended, Job, execute, jobs, running
from tools.monarch.lifeline import Lifelines, hold

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "process.py")
LIFELINE = "MESH_MONARCH_LIFELINE"  # where `hold` connects to
# With it the kernel kills a process whose parent died before it can kill its children. Without it
# each process prints "(bootstrap) PDEATHSIG disabled via config".
NO_PDEATHSIG = "HYPERACTOR_MESH_BOOTSTRAP_ENABLE_PDEATHSIG"
LINE_SECONDS = 2.0  # for a lifeline to confirm a death; the line to a lost host stays open
STOP_SECONDS = 20.0  # for Monarch to stop a mesh; then the lifelines are cut


class NoMeshError(Exception):
    """Monarch could not reach a host or could not start a process there."""


class Rank(Actor):
    """One process of the mesh. Each has two of these: calls of one actor run one after another."""

    @endpoint
    def run(self, job: Job) -> int:
        """Have the main thread run a script; returns its exit status."""
        done: queue.Queue[int] = queue.Queue()
        jobs.put((job, done))
        return done.get()

    @endpoint
    def kill(self, number: int) -> None:
        """Send this process a signal."""
        os.kill(os.getpid(), number)


class Hosts:
    """This host, or those at `addresses` (HOST:PORT) where `serve` runs."""

    def __init__(self, addresses: list[str]) -> None:
        monarch.actor.unhandled_fault_hook = lambda failure: None  # the caller gets the error
        self.address = local_address(addresses)
        self.addresses = addresses
        if addresses:
            enable_transport(f"tcp://{self.address}:0")
            workers = [f"tcp://{address}" for address in addresses]
            self.mesh = attach_to_workers(ca="trust_all_connections", workers=workers)
        else:
            self.mesh = this_host()

    def points(self, per_host: int) -> list[dict[str, int]]:
        """The coordinates of every rank."""
        if not self.addresses:
            return [{"procs": proc} for proc in range(per_host)]
        hosts = range(len(self.addresses))
        return [{"hosts": host, "procs": proc} for host in hosts for proc in range(per_host)]


class Procs:
    """`per_host` processes on each host. As a context manager it leaves none behind."""

    def __init__(self, hosts: Hosts, per_host: int, environment: dict[str, str]) -> None:
        self.hosts, self.per_host, self.environment = hosts, per_host, environment
        self.points = hosts.points(per_host)
        self._lifelines = Lifelines()
        self._busy: set[int] = set()

    async def __aenter__(self) -> Procs:
        port = await self._lifelines.open(self.hosts.address)
        output = "remote" if self.hosts.addresses else "inherited"
        command = default_bootstrap_cmd()
        command.args = [PROGRAM]
        lifeline = {LIFELINE: f"{self.hosts.address}:{port}:{output}", NO_PDEATHSIG: "false"}
        command.env = {**command.env, **self.environment, **lifeline}
        self._mesh = self.hosts.mesh.spawn_procs(
            per_host={"procs": self.per_host}, bootstrap_command=command
        )
        self._runners = self._mesh.spawn("runners", Rank)
        self._signallers = self._mesh.spawn("signallers", Rank)
        try:
            await self._mesh.initialized
        except (RuntimeError, ValueError) as error:
            await self._lifelines.cut()
            raise NoMeshError(str(error).strip().splitlines()[0]) from error
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._busy:
            await self._lifelines.cut()
        with contextlib.suppress(TimeoutError, RuntimeError, ValueError):  # it may be gone
            await asyncio.wait_for(self._mesh.stop(), STOP_SECONDS)
        await self._lifelines.cut()

    async def run(self, rank: int, job: Job) -> Ended:
        """Run a script on a rank, to its end."""
        self._busy.add(rank)
        gone = self._lifelines.gone(rank)
        call = asyncio.create_task(self._call(rank, job))
        try:
            either: set[asyncio.Future] = {call, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if call.done() and call.result().status is not None:
                ended = call.result()
            else:
                await asyncio.wait({gone}, timeout=LINE_SECONDS)
                ended = left(rank, gone.result()) if gone.done() else call.result()
        finally:
            call.cancel()
        self._busy.discard(rank)
        return ended

    async def _call(self, rank: int, job: Job) -> Ended:
        try:
            return Ended(rank, await self._runners.slice(**self.points[rank]).run.call_one(job))
        except SupervisionError as error:
            death = str(error).strip().splitlines()[-1].strip()
            return Ended(rank, death=death, killed=True)

    async def kill(self, rank: int, number: int) -> None:
        """Send a signal to a rank, which may have died."""
        with contextlib.suppress(SupervisionError):
            await self._signallers.slice(**self.points[rank]).kill.call_one(number)


def left(rank: int, status: int | None) -> Ended:
    """How the process of a rank ended, by its own report."""
    if status is None:
        return Ended(rank, death="killed, or crashed outside Python", killed=True)
    if status == 0:
        return Ended(rank, 0)
    return Ended(rank, death=f"left with status {status}")


def local_address(addresses: list[str]) -> str:
    """The address under which the given hosts reach this machine; 127.0.0.1 if there are none."""
    found = {"127.0.0.1"}
    for address in addresses:
        host, _, port = address.rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            found.add(probe.getsockname()[0])
    return min(found, key=lambda address: address.startswith("127."))


def serve(address: str) -> int:
    """Offer this machine as a host at HOST:PORT, until it is killed. No authentication.

    Monarch's loop ends with status 0 some time after the end of a launcher that had lost a process
    here; it is started again.
    """
    status = 0
    while status == 0:
        with subprocess.Popen([sys.executable, PROGRAM, address], stdin=-1) as loop:
            status = loop.wait()
    return status


def host(address: str) -> None:
    """The process of `serve`: Monarch's loop; it ends with its parent."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    run_worker_loop_forever(ca="trust_all_connections", address=f"tcp://{address}")


def work() -> None:
    """The program of a process of the mesh: run jobs until Monarch stops it."""
    line = hold(os.environ.pop(LIFELINE))
    threading.Thread(target=take_part, name="monarch").start()
    try:
        while (item := jobs.get()) is not None:
            job, done = item
            line.sendall(f"rank {job.environment['RANK']}\n".encode())
            done.put(execute(job))
    except KeyboardInterrupt:  # before the script installed its signal handlers
        os._exit(128 + signal.SIGINT)


def take_part() -> None:
    """Serve Monarch until the mesh is stopped, then end the process."""
    from monarch._src.actor.bootstrap_main import invoke_main

    try:
        invoke_main()
    except SystemExit as end:
        if end.code or running.is_set():
            os._exit(int(end.code or 0))
    jobs.put(None)
