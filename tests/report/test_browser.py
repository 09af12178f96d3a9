"""The browser that tests the report page sees what it is said to see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = """<!doctype html><meta name="viewport" content="width=device-width"><title>t</title>
<style>
  body { margin: 0; background: rgb(255, 255, 255) }
  @media (prefers-color-scheme: dark) { body { background: rgb(1, 2, 3) } }
</style>
<p>text</p>"""
WIDE = '<div style="width: 700px">wide</div>'
LOUD = "<script>alert('now'); undefinedName()</script><img src='http://127.0.0.1:6553/x.png'>"


@pytest.fixture
def page(tmp_path):
    """page(more): a file with further HTML."""

    def write(more: str = ""):
        path = tmp_path / "page.html"
        path.write_text(PAGE + more)
        return path

    return write


def test_errors_requests_and_dialogs_are_seen(browser, page):
    browser.open(page(LOUD))
    assert any("undefinedName is not defined" in error for error in browser.errors())
    assert browser.requests() == ["http://127.0.0.1:6553/x.png"]
    assert browser.value("window.alerts") == ["now"]
    browser.open(page())
    assert (browser.errors(), browser.requests(), browser.value("window.alerts")) == ([], [], [])


def test_a_phone_and_dark_mode_are_emulated(browser, page):
    background = "getComputedStyle(document.body).backgroundColor"
    for width, theme, color in (
        (400, "dark", "rgb(1, 2, 3)"),
        (1280, "light", "rgb(255, 255, 255)"),
    ):
        browser.open(page(), width=width, theme=theme)
        assert browser.value("innerWidth") == width
        assert browser.value(background) == color
    browser.open(page(WIDE), width=400)
    assert browser.value("document.scrollingElement.scrollWidth") >= 700


def test_a_machine_without_chromium_says_what_was_not_tested(tmp_path):
    """Also with -q, in the last lines: nobody takes a skipped page for one that works."""
    test = "test_a_phone_and_dark_mode_are_emulated"
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test}"],
        env=os.environ | {"PATH": str(tmp_path)}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    said = "report page: not tested in a browser: needs Debian's chromium and chromium-driver"
    assert made.returncode == 0 and "1 skipped" in made.stdout
    assert [line for line in made.stdout.splitlines() if line.startswith(said)], made.stdout
