"""A connection that a process holds to its launcher for as long as it lives.

If it breaks, or the parent is gone, the process kills itself and all its children: nothing outlives
a launcher that was killed. And the launcher sees at once that a process is gone: Monarch polls each
second, reports one death in a mesh but not the next, and takes 30 s if a process dies with a call
unanswered. Output from other hosts uses the same connections, as Monarch's log forwarding loses the
last lines of a process that ends by os._exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

WATCH_SECONDS = 1.0


class Lifelines:
    """The launcher's end of the connections: prints output, and breaks when the launcher dies."""

    def __init__(self) -> None:
        self._writers: set[asyncio.StreamWriter] = set()
        self._gone: dict[int, asyncio.Future[int | None]] = {}

    def gone(self, rank: int) -> asyncio.Future[int | None]:
        """Done once a rank's process is gone: its exit status, or None if it was killed."""
        return self._gone.setdefault(rank, asyncio.get_running_loop().create_future())

    async def open(self, address: str) -> int:
        """Listen on a free port, and return it."""
        self._server = await asyncio.start_server(self._serve, address, 0, limit=1 << 24)
        return self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Wait briefly for output that is still coming, then close every connection."""
        self._server.close()
        deadline = time.monotonic() + WATCH_SECONDS
        while self._writers and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_SECONDS / 20)
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError):  # the process was killed
            name = await reader.readline()
            if name == b"lifeline\n":
                await self._attend(reader)
            stream = sys.stdout if name == b"stdout\n" else sys.stderr
            async for line in reader:
                stream.write(line.decode(errors="replace"))
                stream.flush()
        self._writers.discard(writer)
        writer.close()

    async def _attend(self, reader: asyncio.StreamReader) -> None:
        """Read what a process reports, `rank N` and `exit STATUS`, until it is gone."""
        said: dict[bytes, int] = {}
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                word, number = line.split()
                said[word] = int(number)
        if b"rank" in said and not (gone := self.gone(said[b"rank"])).done():
            gone.set_result(said.get(b"exit"))


def hold(lifeline: str) -> socket.socket:
    """The process's end: connect to ADDRESS:PORT:OUTPUT, and die when the connection breaks.

    OUTPUT `remote`: stdout and stderr go there too.
    """
    address, port, output = lifeline.rsplit(":", 2)
    if output == "remote":
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            with connected(address, int(port), name) as stream:
                os.dup2(stream.fileno(), descriptor)
    line = connected(address, int(port), "lifeline")
    os.register_at_fork(after_in_child=line.close)  # or a child would keep it open
    announce_exit(line)
    threading.Thread(target=watch, args=(line, os.getppid()), daemon=True).start()
    return line


def announce_exit(line: socket.socket) -> None:
    """Make os._exit report its status first: a process that reports nothing was killed."""
    pid, leave = os.getpid(), os._exit

    def say_and_leave(status: int) -> NoReturn:
        if os.getpid() == pid:  # not in a fork of it
            with contextlib.suppress(OSError):
                line.sendall(f"exit {status}\n".encode())
        leave(status)

    os._exit = say_and_leave


def connected(address: str, port: int, name: str) -> socket.socket:
    stream = socket.create_connection((address, port), timeout=60)
    stream.settimeout(None)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.sendall(f"{name}\n".encode())
    return stream


def watch(line: socket.socket, parent: int) -> None:
    """Kill this process and its children once the launcher or the parent is gone."""
    while os.getppid() == parent and not select.select([line], [], [], WATCH_SECONDS)[0]:
        pass
    if os.getpgid(0) == os.getpid():  # Monarch makes each process the leader of a group
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
