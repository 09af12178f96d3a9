"""The door to Monarch: processes on one or several hosts, each of which runs a script in its main
thread.

Monarch calls actors on threads of their own. A recipe wants the main thread, which alone can take
signals, so a process of the mesh is started with this file as its program: Monarch's loop runs in a
thread, and an endpoint hands the script to the main thread. Everything else is as under torchrun.

A process holds a connection to the launcher for as long as it lives. Where that breaks, or the
parent has gone, it kills itself with all its children: nothing outlives a launcher that was killed.
From other hosts its output comes the same way, because Monarch's own log forwarding loses the last
words of a process that ends by os._exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass

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

LIFELINE = "MESH_MONARCH_LIFELINE"  # ADDRESS:PORT of the launcher, and whether output goes there
STOP_SECONDS = 20.0  # the longest wait for Monarch to stop a mesh; then the lifelines are cut
WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """A script with its words, and where and in what environment it runs."""

    argv: list[str]
    directory: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: `status` where the script came to its end, `death` where its process died."""

    rank: int
    status: int | None = None
    death: str = ""


class Rank(Actor):
    """One process of the mesh. Two of these live in each, as calls queue one behind another."""

    @endpoint
    def run(self, job: Job) -> int:
        """The exit status of a script that the main thread runs."""
        done: queue.Queue[int] = queue.Queue()
        jobs.put((job, done))
        return done.get()

    @endpoint
    def kill(self, number: int) -> None:
        """Send this process a signal."""
        os.kill(os.getpid(), number)


class Lifelines:
    """The launcher's end of the connections: prints what comes, and breaks when it dies."""

    def __init__(self) -> None:
        self._handlers: set[asyncio.Task[None]] = set()

    async def open(self, address: str) -> int:
        """Listen on a free port, and return it."""
        self._server = await asyncio.start_server(self._serve, address, 0, limit=1 << 24)
        return self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Print what is still on its way, then cut what still holds on."""
        self._server.close()
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=WATCH_SECONDS)
        for handler in self._handlers:
            handler.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection is served outside a task"
        self._handlers.add(task)
        try:
            stream = sys.stdout if await reader.readline() == b"stdout\n" else sys.stderr
            async for line in reader:
                stream.write(line.decode(errors="replace"))
                stream.flush()
        except ConnectionError:
            pass  # killed with unread data
        finally:
            self._handlers.discard(task)
            writer.close()


class Hosts:
    """This host, or those at `addresses` (HOST:PORT) where `serve` runs."""

    def __init__(self, addresses: list[str]) -> None:
        monarch.actor.unhandled_fault_hook = lambda failure: None  # its callers see the error
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
    """`per_host` processes on each host. As a context manager, none is left afterwards."""

    def __init__(self, hosts: Hosts, per_host: int, environment: dict[str, str]) -> None:
        self.hosts, self.per_host, self.environment = hosts, per_host, environment
        self.points = hosts.points(per_host)
        self._lifelines = Lifelines()

    async def __aenter__(self) -> Procs:
        port = await self._lifelines.open(self.hosts.address)
        output = "remote" if self.hosts.addresses else "inherited"
        command = default_bootstrap_cmd()
        command.args = ["-P", __file__]  # -P: monarch.py beside this file is not the package
        lifeline = {LIFELINE: f"{self.hosts.address}:{port}:{output}"}
        command.env = {**command.env, **self.environment, **lifeline}
        self._mesh = self.hosts.mesh.spawn_procs(
            per_host={"procs": self.per_host}, bootstrap_command=command
        )
        self._runners = self._mesh.spawn("runners", Rank)
        self._signallers = self._mesh.spawn("signallers", Rank)
        return self

    async def __aexit__(self, *error: object) -> None:
        with contextlib.suppress(TimeoutError, SupervisionError):
            await asyncio.wait_for(_result(self._mesh.stop()), STOP_SECONDS)
        await self._lifelines.close()

    async def run(self, rank: int, job: Job) -> Ended:
        """Have a rank run a script to its end."""
        try:
            status = await self._runners.slice(**self.points[rank]).run.call_one(job)
        except SupervisionError as error:
            return Ended(rank, death=str(error).strip().splitlines()[-1].strip())
        return Ended(rank, status)

    async def kill(self, rank: int, number: int) -> None:
        """Send a rank a signal; one that has died needs none."""
        with contextlib.suppress(SupervisionError):
            await self._signallers.slice(**self.points[rank]).kill.call_one(number)


async def _result(future):
    return await future


def local_address(addresses: list[str]) -> str:
    """The address by which the given hosts reach this machine; 127.0.0.1 where there are none."""
    found = {"127.0.0.1"}
    for address in addresses:
        host, _, port = address.rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            found.add(probe.getsockname()[0])
    return min(found, key=lambda address: address.startswith("127."))


def serve(address: str) -> None:
    """Offer this machine as a host at HOST:PORT, until it is killed. No authentication."""
    run_worker_loop_forever(ca="trust_all_connections", address=f"tcp://{address}")


# ... and from here on a process of the mesh.

jobs: queue.Queue[tuple[Job, queue.Queue[int]] | None] = queue.Queue()


def main() -> None:
    """The program of a process: run what comes until Monarch stops it."""
    sys.modules["monarch_procs"] = sys.modules["__main__"]  # whose actor is called
    hold_lifeline(os.environ.pop(LIFELINE))
    threading.Thread(target=take_part, name="monarch").start()
    try:
        while (item := jobs.get()) is not None:
            job, done = item
            done.put(execute(job))
    except KeyboardInterrupt:  # before the script took its signals
        os._exit(128 + signal.SIGINT)


def hold_lifeline(lifeline: str) -> None:
    """Connect to the launcher, and die with it."""
    address, port, output = lifeline.rsplit(":", 2)
    if output == "remote":
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            with connected(address, int(port), name) as stream:
                os.dup2(stream.fileno(), descriptor)
    line = connected(address, int(port), "lifeline")
    threading.Thread(target=watch, args=(line, os.getppid()), daemon=True).start()


def connected(address: str, port: int, name: str) -> socket.socket:
    stream = socket.create_connection((address, port), timeout=60)
    stream.settimeout(None)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.sendall(f"{name}\n".encode())
    return stream


def watch(line: socket.socket, parent: int) -> None:
    """Kill this process and its children once the launcher or the parent has gone."""
    while os.getppid() == parent and not select.select([line], [], [], WATCH_SECONDS)[0]:
        pass
    if os.getpgid(0) == os.getpid():  # Monarch makes each process the leader of a group
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def take_part() -> None:
    """Serve Monarch until the mesh is stopped, then end the process."""
    from monarch._src.actor.bootstrap_main import invoke_main

    try:
        invoke_main()
    except SystemExit as end:
        if end.code or busy.is_set():
            os._exit(int(end.code or 0))
    jobs.put(None)


busy = threading.Event()


def execute(job: Job) -> int:
    """Run a script as `python SCRIPT WORDS` would; returns its exit status. An exception that it
    does not catch ends the process."""
    os.environ.update(job.environment)
    os.chdir(job.directory)
    sys.argv[:] = job.argv
    sys.orig_argv[:] = [sys.executable, *job.argv]
    sys.path.insert(0, os.path.dirname(os.path.abspath(job.argv[0])))
    busy.set()
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
        busy.clear()
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
