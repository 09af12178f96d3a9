"""The live page in Chromium: it draws itself again as a run goes on, and keeps the view."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launching import REPOSITORY

POINTS = "Number(document.querySelector('[data-chart=reward] path.line')?.dataset.points)"


@contextmanager
def watched(*words: Path | str) -> Iterator[str]:
    """The address at which tools/watch.py serves a run; it ends with Ctrl-C's signal."""
    command = [sys.executable, str(REPOSITORY / "tools" / "watch.py"), *map(str, words), "port=0"]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert watch.stdout is not None
        found = re.search(r"http://\S+/", watch.stdout.readline())
        assert found
        yield found[0]
    finally:
        watch.terminate()
        assert watch.wait(20) == 0


def first_lines(path: Path, count: int) -> str:
    return "".join(path.read_text().splitlines(keepends=True)[:count])


def test_the_page_follows_a_run_and_keeps_the_readers_view(browser, made, tmp_path):
    whole, run = made["tiny"].path, tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "environment.json"):
        shutil.copy(whole / name, run)
    (run / "metrics.jsonl").write_text(first_lines(whole / "metrics.jsonl", 6))
    with watched(run, "every=1") as url:
        browser.open(url)
        browser.wait_for(f"{POINTS} === 5")
        assert (
            browser.value("document.querySelector('#headline [data-done]').dataset.done") == "false"
        )
        assert "samples.jsonl" in browser.value("document.getElementById('missing').textContent")
        browser.script("window.sameDocument = true; location.hash = '#curves?zoom=reward&mark=3'")
        browser.script("document.querySelector('[data-chart=entropy] summary').click()")
        (run / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
        shutil.copy(whole / "samples.jsonl.gz", run)
        browser.wait_for(f"{POINTS} === 12")
        browser.wait_for("document.getElementById('rollouts-count')?.textContent.length > 5")
        assert browser.value("window.sameDocument"), "it was not loaded again"
        notices = "[...document.querySelectorAll('[id=missing]')].map((one) => one.textContent)"
        assert not any("samples.jsonl" in notice for notice in browser.value(notices))
        assert browser.value("location.hash") == "#curves?zoom=reward&mark=3"
        large = "document.querySelector('[data-chart=reward]').classList.contains('large')"
        assert browser.value(large)
        assert browser.value("document.querySelector('[data-chart=entropy] details').open")
        assert browser.errors() == []
        asked = set(browser.requests())
        assert asked and all(address.startswith(f"{url}data.json") for address in asked)


def test_a_page_is_open_before_its_run_begins(browser, made, tmp_path):
    run = tmp_path / "run"
    with watched(run, "every=1") as url:
        browser.open(url)
        browser.wait_for(
            "document.getElementById('live')?.textContent.includes('does not exist yet')"
        )
        shutil.copytree(made["tiny"].path, run)
        browser.wait_for(f"{POINTS} === 12")
        assert browser.errors() == []
