"""Serve the report of a run, or of several, while it goes on.

    python tools/watch.py RUN_DIR [OTHER_RUN ...] [port=8765] [every=5] [host=127.0.0.1]
                          [hide=hosts,paths]

The page is that of tools/report.py, and draws itself again when the run has written. It is served
to this machine alone; for a run on another machine start this there, and bring the port here:

    ssh -L 8765:127.0.0.1:8765 HOST

`port=0` takes a free port. `every`: the fewest seconds between two readings of the run; nothing is
read while no page is open. `host`: another address of this machine; everybody who can reach it can
then read the run. `hide=hosts,paths`, or one of both, leaves out names of machines, and paths and
names of users. Nothing is written, and no file is served. Ctrl-C ends it. Exit status 2 where an
option is wrong or the port is taken.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

from mesh.config.keys import problem
from tools.report.html import page
from tools.report.options import Options
from tools.watch.feed import Feed, has_begun, nothing
from tools.watch.options import LOCAL, WatchOptions, read_options
from tools.watch.server import Server

NICE = 19  # the run on this machine goes first
EXPOSED = (
    "warning: host={host}: everybody who can reach this address can read the run: its prompts, "
    "answers and configuration; there is no password and no encryption. Leave host out and use "
    "ssh -L to look from another machine"
)


def main(argv: Sequence[str]) -> int:
    try:
        options = read_options(argv, __doc__ or "")
        server = server_of(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    os.nice(NICE)
    signal.signal(signal.SIGTERM, interrupt)
    with server:
        try:
            say(options, server)
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended", flush=True)
    return 0


def interrupt(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does."""
    raise KeyboardInterrupt


def server_of(options: WatchOptions) -> Server:
    """Raises ValueError where the address cannot be served."""
    feed = Feed(options.run_dirs, options.every, Options(hide=options.hide))
    live = nothing() | {"live": {"every": options.every, "states": [], "waiting": []}}
    text, names = page(live, connect="'self'"), () if options.host == LOCAL else (options.host,)
    try:
        return Server(options.address, options.port, text, feed, names)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            remedy = "name an address of this machine, or leave it out"
            wrong = problem("host", options.host, "not an address of this machine", remedy)
            raise ValueError(wrong) from error
        taken = error.errno == errno.EADDRINUSE
        wrong = "another program listens there" if taken else str(error.strerror)
        remedy = "name another one, or port=0 for a free one"
        raise ValueError(problem("port", options.port, wrong, remedy)) from error


def say(options: WatchOptions, server: Server) -> None:
    """Print where the page is."""
    port = server.server_port
    names = ", ".join(map(str, options.run_dirs))
    print(f"{names}: {server.url} (Ctrl-C ends it)")
    for path in options.run_dirs:
        if not has_begun(path):
            print(f"{path} holds no run yet; the page fills when it has begun")
    if options.is_local:
        host = socket.gethostname()
        print(f"on your own machine: ssh -L {port}:127.0.0.1:{port} {host}, then {server.url}")
    else:
        print(EXPOSED.format(host=options.host), file=sys.stderr)
    sys.stdout.flush()
