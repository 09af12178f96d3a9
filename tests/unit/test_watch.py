"""The live report: what the server gives, what it refuses, when it reads the run again."""

from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import REPOSITORY

from tools.report.options import Options
from tools.watch import server as serving
from tools.watch.feed import Feed, is_locked, nothing, state
from tools.watch.main import say, server_of
from tools.watch.options import WatchOptions, read_options
from tools.watch.server import Server

SECRET = "what no request may give"


def write_run(path: Path, steps: int) -> Path:
    """What a run of so many steps leaves, and a file that is nobody's business."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("task: spell_backward\nsteps: 100\n")
    (path / "secret.txt").write_text(SECRET)
    append(path, *range(steps + 1))
    return path


def append(path: Path, *steps: int) -> None:
    with open(path / "metrics.jsonl", "a") as file:
        for step in steps:
            line = {"step": step, "reward/mean": step / 100, "entropy": 1.0, "loss": 0.0}
            file.write(json.dumps(line) + "\n")


class Client:
    """What a server answers to raw requests."""

    def __init__(self, server: Server):
        self.server, self.host = server, f"localhost:{server.server_port}"

    def send(self, text: str) -> tuple[int, dict[str, str], bytes]:
        with socket.create_connection(("127.0.0.1", self.server.server_port), timeout=20) as one:
            one.sendall(text.encode())
            answer = b"".join(iter(lambda: one.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return int(status.split()[1]), headers, body

    def ask(self, path: str = "/data.json", method: str = "GET", **headers: str):
        lines = {"Host": self.host} | {k.replace("_", "-"): v for k, v in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n")


@contextmanager
def served(feed: Feed, page: str = "<p>the page</p>") -> Iterator[Client]:
    with Server("127.0.0.1", 0, page, feed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield Client(server)
        server.shutdown()


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path / "run", 3)


@pytest.fixture
def client(run_dir) -> Iterator[Client]:
    with served(Feed([run_dir], 1.0)) as found:
        yield found


def steps_of(body: bytes) -> list[int]:
    (run,) = json.loads(body)["runs"]
    (steps,) = {
        tuple(series["steps"])
        for curve in run["curves"]
        for series in curve["series"]
        if series["key"] == "reward/mean"
    }
    return list(steps)


def test_the_two_resources_and_their_headers(client):
    status, page_headers, body = client.ask("/")
    assert (status, body) == (200, b"<p>the page</p>")
    status, headers, body = client.ask("/data.json?path=../secret.txt")  # a query has no influence
    assert status == 200 and steps_of(body) == [0, 1, 2, 3]
    assert body == client.ask()[2]
    assert page_headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    for one in (page_headers, headers, client.ask("/no")[1], client.ask("/", "POST")[1]):
        assert "default-src 'none'; frame-ancestors 'none'" in one["Content-Security-Policy"]
        assert one["X-Content-Type-Options"] == "nosniff"
        assert one["Cache-Control"] == "no-store" and one["Referrer-Policy"] == "no-referrer"
        assert one["Cross-Origin-Resource-Policy"] == "same-origin"
        assert one["Server"] == "mesh-watch"
        assert not [name for name in one if name.startswith("Access-Control")]


def test_the_page_that_is_served_may_run_its_own_scripts_alone(run_dir):
    with server_of(WatchOptions((run_dir,), 0, 5.0, "127.0.0.1", "127.0.0.1", ())) as server:
        text, policy = server.page.decode(), server.policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    for element, rule in (("script", "script-src"), ("style", "style-src")):
        parts = re.findall(rf"<{element}\b([^>]*)>(.*?)</{element}>", text, re.S)
        run = [part for attributes, part in parts if "application/json" not in attributes]
        hashes = [base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in run]
        assert len(run) > 1 and rules[rule].split() == [f"'sha256-{one}'" for one in hashes]
    assert "connect-src 'self'" in text  # the page's own policy lets it ask
    (embedded,) = re.findall(r'id="data">(.*?)</script>', text)
    assert json.loads(embedded)["live"] == {"every": 5.0, "states": [], "waiting": []}


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
def test_names_of_this_machine_are_served(client, name):
    port = client.server.server_port
    assert client.ask("/", Host=f"{name}:{port}")[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        *("evil.example", "evil.example:{port}", "localhost", "localhost:1", "127.0.0.1"),
        *("localhost:{port}.evil.example", "localhost:{port}@evil.example", "127.0.0.2:{port}"),
        *("localhost.:{port}", "localhost :{port}", "", "localhost:{port}, evil.example"),
        *("http://localhost:{port}", "0.0.0.0:{port}", "[::]:{port}", "127.1:{port}"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/data.json"])
def test_foreign_hosts_are_refused(client, name, path):
    status, _, body = client.ask(path, Host=name.format(port=client.server.server_port))
    assert status == 403
    assert body.decode() == f"403 Forbidden: open {client.server.url}\n"


def test_no_host_and_two_hosts_are_refused(client):
    assert client.send("GET / HTTP/1.0\r\n\r\n")[0] == 403
    hosts = f"Host: {client.host}\r\nHost: evil.example\r\n"
    assert client.send(f"GET / HTTP/1.1\r\n{hosts}\r\n")[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        *("/secret.txt", "/../config.yaml", "/%2e%2e/config.yaml", "/..%2fconfig.yaml", "/."),
        *("/data.json/../secret.txt", "//data.json", "/data.json/", "/data.json%00", "/DATA.JSON"),
        *("/./data.json", "data.json", "http://localhost/data.json", "file:///etc/passwd", "*"),
        *("//", "/index.html", "/favicon.ico", "/\\..\\config.yaml", "/;/", "/#", "/%2f"),
    ],
)
def test_no_other_path_is_served(client, path):
    status, _, body = client.ask(path)
    assert (status, body) == (404, b"404 Not Found\n")


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "FOO"]
)
def test_only_get_and_head(client, run_dir, method):
    before = sorted(path.name for path in run_dir.iterdir())
    status, headers, _ = client.ask("/data.json", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert sorted(path.name for path in run_dir.iterdir()) == before


@pytest.mark.parametrize(
    "text", ["\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "\x00\r\n\r\n"]
)
def test_what_is_no_request_gets_no_data(client, text):
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=20) as one:
        one.sendall(text.encode())
        answer = b"".join(iter(lambda: one.recv(65536), b""))
    assert b"200 OK" not in answer and b"the page" not in answer
    assert client.ask("/")[0] == 200


def test_head_has_the_headers_of_get_and_no_body(client):
    for path in ("/", "/data.json"):
        status, headers, body = client.ask(path, "HEAD")
        found = client.ask(path)
        assert (status, body) == (200, b"")
        assert {**headers, "Date": ""} == {**found[1], "Date": ""}
        assert int(headers["Content-Length"]) == len(found[2])


def test_compressed_for_who_asks(client):
    _, headers, body = client.ask(Accept_Encoding="gzip, br")
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == client.ask()[2]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_unchanged_data_is_not_sent_and_new_lines_are(run_dir):
    clock = Clock()
    feed = Feed([run_dir], 5.0, now=clock)
    with served(feed) as client:
        _, headers, _ = client.ask()
        tag = headers["ETag"]
        clock.now += 60
        status, headers, body = client.ask(If_None_Match=f'"other", {tag}')
        assert (status, body, headers["ETag"]) == (304, b"", tag)
        assert "Content-Length" not in headers and feed.readings == 1
        append(run_dir, 4)
        clock.now += 60
        status, headers, body = client.ask(If_None_Match=tag)
        assert status == 200 and headers["ETag"] != tag
        assert steps_of(body) == [0, 1, 2, 3, 4] and feed.readings == 2
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write('{"step": 5, "rewa')  # as the run is being read while it writes
        clock.now += 60
        data = json.loads(client.ask()[2])
        assert any("ends in half" in sentence for sentence in data["runs"][0]["missing"])


def test_the_run_is_read_no_more_often_than_asked_for(run_dir):
    clock = Clock()
    feed = Feed([run_dir], 5.0, now=clock)
    first = feed.latest()
    append(run_dir, 4)
    clock.now += 4.9
    assert feed.latest() is first
    clock.now += 0.2
    assert steps_of(feed.latest().body) == [0, 1, 2, 3, 4]


def test_a_run_that_takes_long_to_read_is_read_less_often(run_dir, monkeypatch):
    clock, busy = Clock(), Clock()
    feed = Feed([run_dir], 1.0, now=clock, busy=busy)
    read = feed._data

    def slowly(locked):
        busy.now += 2.0
        return read(locked)

    monkeypatch.setattr(feed, "_data", slowly)
    feed.latest()
    append(run_dir, 4)
    clock.now += 37.9  # 2 s are a twentieth of 40 s
    feed.latest()
    assert feed.readings == 1
    clock.now += 0.2
    feed.latest()
    assert feed.readings == 2


def live_of(feed: Feed) -> dict:
    return json.loads(feed.latest().body)["live"]


def test_what_is_known_of_each_run(tmp_path):
    clock = Clock()
    later, empty = tmp_path / "later", tmp_path / "empty"
    run_dir = write_run(tmp_path / "run", 3)
    empty.mkdir()
    feed = Feed([later, run_dir, empty], 2.0, now=clock)
    waiting = [f"{later} does not exist yet.", f"{empty} holds no run yet."]
    assert live_of(feed) == {"every": 2.0, "states": ["stopped"], "waiting": waiting}
    write_run(later, 100)
    shutil.rmtree(empty)
    with open(run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clock.now += 60
        live = live_of(feed)
        assert live["states"][1:] == ["running"]
        assert live["waiting"] == [f"{empty} does not exist yet."]
        assert [run["name"] for run in json.loads(feed.latest().body)["runs"]] == ["later", "run"]
    clock.now += 60
    assert live_of(feed)["states"][1:] == ["stopped"]
    assert not is_locked(run_dir) and not is_locked(tmp_path / "gone")
    assert [state(done, locked) for done in (True, False) for locked in (True, False, None)] == [
        *("running", "ended", "ended"),
        *("running", "stopped", "unknown"),
    ]


def test_before_there_is_a_run(tmp_path):
    feed = Feed([tmp_path / "run"], 5.0)
    assert json.loads(feed.latest().body) == nothing() | {
        "live": {
            "every": 5.0,
            "states": [],
            "waiting": [f"{tmp_path / 'run'} does not exist yet."],
        }
    }


def test_names_and_paths_are_hidden_where_asked(run_dir):
    (run_dir / "environment.json").write_text('{"ranks": [{"rank": 0, "host": "gpu-7"}]}')
    shown, hidden = (Feed([run_dir], 5.0, Options(hide=hide)) for hide in ((), ("hosts",)))
    assert b"gpu-7" in shown.latest().body
    assert b"gpu-7" not in hidden.latest().body


def test_slow_clients_hold_nobody_up_and_are_cut_off(run_dir, monkeypatch):
    monkeypatch.setattr(serving, "CONNECTION_SECONDS", 2.0)
    with served(Feed([run_dir], 1.0)) as client:
        place = ("127.0.0.1", client.server.server_port)
        slow = [
            socket.create_connection(place, timeout=20) for _ in range(serving.MOST_CONNECTIONS)
        ]
        for one in slow:
            one.sendall(b"GET / HT")
        time.sleep(0.3)
        began = time.monotonic()
        assert client.send(f"GET / HTTP/1.1\r\nHost: {client.host}\r\n\r\n")[0] == 503
        assert time.monotonic() < began + 1
        assert [one.recv(1) for one in slow] == [b""] * len(slow)
        assert 1 < time.monotonic() - began < 8
        time.sleep(0.5)  # until their threads have seen it
        assert client.ask("/")[0] == 200
        slow.append(socket.create_connection(place, timeout=20))
        assert client.ask("/")[0] == 200
        for one in slow:
            one.close()


def test_a_big_run_is_a_small_answer(tmp_path):
    run_dir = write_run(tmp_path / "run", 0)
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(20_001):
            values = {f"metric/{i}": (step * 7919 + i) % 1000 / 999 for i in range(40)}
            file.write(json.dumps({"step": step, "reward/mean": step / 20_000} | values) + "\n")
    with served(Feed([run_dir], 1.0)) as client:
        _, headers, body = client.ask(Accept_Encoding="gzip")
        assert len(body) < 2e6
        data = gzip.decompress(body)
        assert len(data) < 5e6
        steps = steps_of(data)
        assert (steps[0], steps[-1]) == (0, 20_000)
        began = time.monotonic()
        assert client.ask(If_None_Match=headers["ETag"])[0] == 304
        assert time.monotonic() < began + 0.5


def refused(*words: str) -> list[str]:
    with pytest.raises(ValueError) as error:
        read_options(words, "usage")
    return str(error.value).splitlines()


def test_options():
    found = read_options(["runs/a", "./b=c", "port=0", "host=localhost", "hide=paths"], "")
    assert found.run_dirs == (Path("runs/a"), Path("b=c"))
    assert (found.port, found.every, found.is_local, found.hide) == (0, 5.0, True, ("paths",))
    assert not read_options(["a", "host=192.0.2.1"], "").is_local
    assert refused() == refused("port=1", "--help") == ["usage"]
    lines = refused("a", "port=70000", "every=0", "host=0.0.0.0", "hide=users", "prot=1")
    assert [line.split(":")[0] for line in lines] == [
        *("prot=1", "port=70000", "every=0", "host=0.0.0.0", "hide=users")
    ]
    assert "did you mean port?" in lines[0]
    assert refused("a", "host=no.such.invalid")[0].startswith("host=no.such.invalid: not an addr")
    assert refused("a", "host=::")[0].startswith("host=::: every address")


def options(run_dir: Path, port: int, address: str = "127.0.0.1") -> WatchOptions:
    return WatchOptions((run_dir,), port, 5.0, address, address, ())


def test_where_it_cannot_listen(run_dir):
    with server_of(options(run_dir, 0)) as first:
        port = first.server_port
        with pytest.raises(
            ValueError, match=f"port={port}: another program.* or port=0 for a free"
        ):
            server_of(options(run_dir, port))
    with pytest.raises(ValueError, match=r"host=192\.0\.2\.1: not an address of this machine"):
        server_of(options(run_dir, 0, "192.0.2.1"))


def test_another_address_is_warned_of_and_a_tunnel_is_shown(run_dir, capsys):
    with server_of(options(run_dir, 0)) as server:
        say(options(run_dir, server.server_port), server)
        out, err = capsys.readouterr()
        port = server.server_port
        assert out.startswith(f"{run_dir}: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n")
        assert f"ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}" in out and err == ""
        say(options(run_dir, port, "192.0.2.1"), server)
        out, err = capsys.readouterr()
        assert "ssh" not in out
        assert err.startswith("warning: host=192.0.2.1: everybody who can reach this address")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_begins_before_the_run_and_ends_well(tmp_path, number):
    run_dir = tmp_path / "run"
    command = [sys.executable, str(REPOSITORY / "tools/watch.py"), str(run_dir), "port=0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        try:
            assert program.stdout is not None
            port = int(re.search(r":(\d+)/ ", program.stdout.readline())[1])
            said = program.stdout.readline()
            assert said.startswith(f"{run_dir} holds no run yet; the page fills")
            assert os.getpriority(os.PRIO_PROCESS, program.pid) == 19
            with socket.create_connection(("127.0.0.1", port), timeout=20) as idle:
                idle.sendall(b"GET")  # a client that is connected keeps nothing from ending
                program.send_signal(number)
                out, err = program.communicate(timeout=20)
        finally:
            program.kill()
    assert (program.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "ended"
