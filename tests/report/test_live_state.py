"""What the live page in Chromium says of its runs and of its server."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from report_runs import make_run, metrics_line, write_lines

from tools.watch import feed
from tools.watch.main import server_of
from tools.watch.options import WatchOptions
from tools.watch.server import Server

SAYS = "document.querySelector('#live').textContent"
STATE = "document.querySelector('#live').dataset.state"
POINTS = 'document.querySelector(`path.line[data-key="reward/mean"]`)?.dataset.points'
SECTIONS = "document.querySelectorAll('main > section').length"


@contextmanager
def watched(*run_dirs: Path) -> Iterator[Server]:
    with server_of(WatchOptions(run_dirs, 0, 1.0, "127.0.0.1", "127.0.0.1", ())) as server:
        server.feed._every = 0.2  # the page asks as often as the data tells it to
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def grow(run_dir: Path, steps: int) -> None:
    """Write the metrics of so many steps of 100."""
    write_lines(run_dir / "metrics.jsonl", [metrics_line(step, 100) for step in range(steps + 1)])


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of 100 steps that has taken 5."""
    path = make_run(tmp_path / "run", steps=100, prompts=1)
    grow(path, 5)
    return path


@pytest.fixture(autouse=True)
def quickly(monkeypatch) -> None:
    """The run is read at every request."""
    monkeypatch.setattr(feed, "SHARE", 1.0)


def test_it_says_whether_the_run_goes_on_and_asks_its_server_alone(browser, run_dir):
    with watched(run_dir) as server, open(run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        browser.open(server.url, "#curves?theme=dark&mark=3")
        browser.wait_for(f"{STATE} === 'running'")
        assert browser.value(SAYS).startswith("live · updated ")
        assert browser.value(POINTS) == "5"
        grow(run_dir, 8)
        browser.wait_for(f"{POINTS} === '8'")
        assert browser.value("location.hash") == "#curves?theme=dark&mark=3"
        assert browser.value("document.documentElement.dataset.theme") == "dark"
        assert browser.errors() == []  # a violation of the policy would be one
        assert set(browser.requests()) == {f"{server.url}data.json"}
        fcntl.flock(lock, fcntl.LOCK_UN)
        browser.wait_for(f"{STATE} === 'stopped'")
        assert "no process writes to it" in browser.value(SAYS)
        grow(run_dir, 100)
        browser.wait_for(f"{STATE} === 'ended'")
        assert browser.value(SAYS).startswith("the run has ended · updated ")


def test_it_waits_for_the_run_and_says_when_the_server_has_gone(browser, tmp_path):
    run_dir = tmp_path / "run"
    with watched(run_dir) as server:
        browser.open(server.url)
        browser.wait_for(f"{SAYS}.includes('does not exist yet')")
        assert browser.value("document.querySelector('#report').textContent").startswith("There is")
        make_run(run_dir, steps=4)
        browser.wait_for(f"{SECTIONS} === 8")
        assert browser.errors() == []
    browser.wait_for(f"{STATE} === 'gone'")
    assert browser.value(SAYS).startswith("the server does not answer: it has ended")
    assert browser.value(SECTIONS) == 8


def test_an_error_of_the_page_is_not_laid_on_the_server(browser, run_dir):
    """Most errors of scripts are TypeErrors, as that of a server that does not answer."""
    with watched(run_dir) as server:
        browser.open(server.url)
        browser.wait_for(f"{POINTS} === '5'")
        browser.script("window.draw = Report.draw; Report.draw = () => null.runs")
        grow(run_dir, 8)
        browser.wait_for(f"{SAYS}.startsWith('the new data cannot be drawn')")
        assert any("TypeError" in error for error in browser.errors())
        browser.script("Report.draw = window.draw")
        browser.wait_for(f"{POINTS} === '8'")
        assert browser.value(STATE) == "stopped"


def asks(browser, times: int) -> None:
    """Wait until the page has asked so many times."""
    until = time.monotonic() + 20
    while times > 0:
        assert time.monotonic() < until
        time.sleep(0.1)
        times -= len(browser.requests())


def test_what_has_not_changed_is_not_drawn_again(browser, run_dir):
    with watched(run_dir) as server:
        browser.open(server.url)
        browser.wait_for(f"{POINTS} === '5'")
        browser.script("""window.drawn = 0; const draw = Report.draw;
            Report.draw = (data) => { window.drawn++; draw(data); }""")
        browser.requests()
        asks(browser, 4)
        assert browser.value("window.drawn") == 0
        grow(run_dir, 8)
        browser.wait_for(f"{POINTS} === '8'")
        assert browser.value("window.drawn") == 1


def test_a_page_that_nobody_sees_asks_for_nothing(browser, run_dir):
    with watched(run_dir) as server:
        browser.open(server.url)
        browser.wait_for(f"{POINTS} === '5'")
        browser.script("""window.away = true;
            Object.defineProperty(document, "hidden", {get: () => window.away})""")
        time.sleep(1)  # what was asked is answered, and was to be asked again after 0.2 s
        browser.requests()
        grow(run_dir, 8)
        time.sleep(1)
        assert browser.requests() == [] and browser.value(POINTS) == "5"
        browser.script("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
        browser.wait_for(f"{POINTS} === '8'")


def test_a_file_is_not_live(browser, report, run_dir):
    browser.open(report(run_dir))
    assert browser.value("document.querySelector('#live')") is None
    assert browser.requests() == []
