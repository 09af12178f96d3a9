"""The server of the live page: two resources, nothing of the file system, readers alone.

A page from elsewhere must not read the run through a browser of this machine: a request has to name
this server as its host (a name that an attacker points at 127.0.0.1 is refused), no other origin is
allowed to read an answer, and the page runs its own scripts alone.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tools.watch.feed import Feed

MOST_CONNECTIONS = 32
QUIET_SECONDS = 10.0  # the longest pause of a client
CONNECTION_SECONDS = 60.0  # the longest life of a connection
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
HTML, JSON, TEXT = "text/html", "application/json", "text/plain"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own scripts and styles, by their hashes, and data
    from this server. Attributes of style are the page's own, too, and cannot be hashed."""

    def hashes(element: str) -> str:
        texts = re.findall(f"<{element}>(.*?)</{element}>", page, re.S)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"{NOTHING}; connect-src 'self'; img-src data:; script-src {hashes('script')}; "
        f"style-src {hashes('style')}; style-src-attr 'unsafe-inline'"
    )


class Server(ThreadingHTTPServer):
    """Serves a page and the data of a feed to a bounded number of clients, none for long. `hosts`:
    what a request may call it; `port`: 0 for a free one. Raises OSError where it cannot listen."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: str, port: int, page: str, feed: Feed, names: tuple[str, ...] = ()):
        self.page, self.policy, self.feed = page.encode(), policy(page), feed
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._begun: dict[socket.socket, float] = {}
        if ":" in address:
            self.address_family = socket.AF_INET6
        super().__init__((address, port), Handler)
        bracketed = f"[{address}]" if ":" in address else address
        names = (*LOCAL_NAMES, bracketed, *(name.lower() for name in names))
        self.hosts = {f"{name}:{self.server_port}" for name in names}
        if self.server_port == 80:
            self.hosts |= set(names)
        self.url = f"http://{bracketed}:{self.server_port}/"

    def server_bind(self) -> None:
        """Without asking a name server what this machine is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            request.settimeout(1)
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        self._begun[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._begun.pop(request, None)
            self._free.release()

    def service_actions(self) -> None:
        """Cut off who has been connected for too long."""
        for request, began in list(self._begun.items()):
            if time.monotonic() > began + CONNECTION_SECONDS:
                self._begun.pop(request, None)
                with contextlib.suppress(OSError):  # it has gone by itself
                    request.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and closes it

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # those are of clients that have gone
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of `/` and `/data.json`; queries are ignored."""

    server: Server
    timeout = QUIET_SECONDS

    def do_GET(self) -> None:
        path = self.requestline.split()[1].partition("?")[0]  # self.path is not what was asked for
        if self.headers.get_all("Host", [""]) not in self._hosts():
            self.send_error(HTTPStatus.FORBIDDEN, f"open {self.server.url}")
        elif path == "/":
            headers = {"Content-Security-Policy": self.server.policy}
            self._send(HTTPStatus.OK, HTML, self.server.page, headers)
        elif path == "/data.json":
            self._send_data()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def version_string(self) -> str:
        return "mesh-watch"

    def _hosts(self) -> list[list[str]]:
        """The Host headers that a request may have: exactly one, which names this server."""
        return [[host] for host in self.server.hosts]

    def _send_data(self) -> None:
        snapshot = self.server.feed.latest()
        headers = {"ETag": snapshot.etag, "Vary": "Accept-Encoding"}
        known = self.headers.get("If-None-Match", "")
        if snapshot.etag in [tag.strip() for tag in known.split(",")]:
            self._send(HTTPStatus.NOT_MODIFIED, JSON, b"", headers)
            return
        body = snapshot.body
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body, headers["Content-Encoding"] = snapshot.compressed, "gzip"
        self._send(HTTPStatus.OK, JSON, body, headers)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Plain text that repeats nothing of the request. A method that is not known here is one
        that is not allowed."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status, message = HTTPStatus.METHOD_NOT_ALLOWED, None
        said = message if status == HTTPStatus.FORBIDDEN else None
        text = f"{status.value} {status.phrase}" + (f": {said}" if said else "")
        allow = {"Allow": "GET, HEAD"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
        self._send(status, TEXT, f"{text}\n".encode(), allow)

    def _send(self, status: int, kind: str, body: bytes, more: Mapping[str, str]) -> None:
        self.send_response(status)
        headers = {"Content-Security-Policy": NOTHING, **HEADERS, **more}
        if status != HTTPStatus.NOT_MODIFIED:
            headers |= {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal has the address and what goes wrong."""
