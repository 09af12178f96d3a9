"""Options of the live report, from a command line of directories and key=value words."""

from __future__ import annotations

import ipaddress
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.config.keys import problem
from tools.report.options import hidden, hide_problems, read_words

LOCAL = "127.0.0.1"
DEFAULTS = {"port": "8765", "every": "5", "host": LOCAL, "hide": ""}


@dataclass(frozen=True)
class WatchOptions:
    """port: 0 for a free one; every: the fewest seconds between two readings of the runs; address:
    what `host` means; hide: as of the report."""

    run_dirs: tuple[Path, ...]
    port: int
    every: float
    host: str
    address: str
    hide: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """True where other machines cannot reach the server."""
        return ipaddress.ip_address(self.address).is_loopback


def read_options(argv: Sequence[str], usage: str) -> WatchOptions:
    """Raises ValueError with `usage`, or with all that is wrong with the command line."""
    run_dirs, given, wrong = read_words(argv, DEFAULTS, usage)
    keys = DEFAULTS | given
    address = address_of(keys["host"])
    wrong += [line for line in problems(keys, address) if line]
    if wrong:
        raise ValueError("\n".join(wrong))
    return WatchOptions(
        tuple(run_dirs),
        int(keys["port"]),
        float(keys["every"]),
        keys["host"],
        address,
        hidden(keys["hide"]),
    )


def problems(keys: dict[str, str], address: str) -> list[str]:
    """What is wrong with the values; an empty text where nothing is."""
    port, every, host, hide = (keys[name] for name in ("port", "every", "host", "hide"))
    known_port = port.isascii() and port.isdigit() and int(port) < 1 << 16
    remedy = "name one address of this machine, or leave it out"
    return [
        ""
        if known_port
        else problem("port", port, "not a port", "use 1 to 65535, or 0 for a free one"),
        "" if seconds(every) else problem("every", every, "not a time", "use seconds, 1 or more"),
        "" if address else problem("host", host, "not an address of this machine", remedy),
        problem("host", host, "every address of this machine at once", remedy)
        if address and ipaddress.ip_address(address).is_unspecified
        else "",
        *hide_problems(hide),
    ]


def seconds(text: str) -> bool:
    try:
        return 1 <= float(text) < math.inf
    except ValueError:
        return False


def address_of(host: str) -> str:
    """The numeric address of a host; empty where it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ""
    return str(found[0][4][0]) if host else ""
