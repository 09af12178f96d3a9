"""A run that is watched: `tools/watch.py` beside it, and a reader that asks as the page does."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

from tools import ROOT
from tools.bench.measured_run import children_cpu_seconds

PATIENCE = 60  # seconds for an answer


@dataclass
class Watched:
    """What the reader got, and what the server took: answers with new data, their bytes as sent,
    and CPU seconds of the whole command."""

    answers: int = 0
    sent: int = 0
    cpu_seconds: float = 0.0


@contextmanager
def watching(run_dir: Path, every: float) -> Iterator[Watched]:
    """Have a run watched for the length of a block, in which it begins; its data is asked for every
    so many seconds."""
    command = [sys.executable, str(ROOT / "tools" / "watch.py"), str(run_dir), "port=0"]
    watched, ended = Watched(), Event()
    with (
        subprocess.Popen(
            [*command, f"every={every:g}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        assert server.stdout is not None, "it is a pipe"
        try:
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found, "the server does not say where the page is"
            reader = pool.submit(read_page, found[0], every, ended, watched)
            yield watched
            ended.set()
            reader.result()
        finally:
            ended.set()
            server.terminate()
            before = children_cpu_seconds()
            server.wait()
            watched.cpu_seconds = children_cpu_seconds() - before


def read_page(url: str, every: float, ended: Event, watched: Watched) -> None:
    """Open the page and ask for its data again and again, as a browser does, until it has ended."""
    address, tag = urlsplit(url).netloc, ""
    asked(address, "/", "")
    while not ended.wait(every):
        status, tag, size = asked(address, "/data.json", tag)
        watched.answers += status == HTTPStatus.OK
        watched.sent += size


def asked(address: str, path: str, tag: str) -> tuple[int, str, int]:
    """(status, ETag, bytes) of an answer; tag: of what is known already."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    headers = {"Accept-Encoding": "gzip"} | ({"If-None-Match": tag} if tag else {})
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status in (HTTPStatus.OK, HTTPStatus.NOT_MODIFIED), f"{path}: {answer.status}"
    return answer.status, answer.headers.get("ETag") or tag, len(body)
