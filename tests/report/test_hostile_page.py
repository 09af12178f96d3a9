"""A run whose texts attack the page is shown as text; a damaged directory as far as it is read."""

from __future__ import annotations

import shutil

import pytest
from hostile_runs import LONG, NAME, PROMPT, TEXTS, damages, hostile_run

from tools.report.main import main

GROUP = f"#rollouts?group=train-1-{PROMPT}"
ELEMENTS = "document.querySelectorAll(arguments[0]).length"
HANDLERS = """[...document.querySelectorAll("*")].flatMap((node) => [...node.attributes])
    .filter((one) => one.name.startsWith("on") || (/^\\s*javascript:/i.test(one.value)
      && ["href", "src", "action", "formaction", "xlink:href"].includes(one.name)))
    .map((one) => one.name + "=" + one.value)"""
SHOWN = """[...document.querySelectorAll(
    `#rollouts-detail [data-sample="${arguments[0]}"] .ro-turn`)].at(-1).textContent"""
AS_SIGNS = {
    "\x00": "\u2400", "\x07": "\u2407", "\x1b": "\u241b", "\r": "\u240d", "\u2028": "LS",
    "\u2029": "PS", "\ufeff": "BOM", "\u202e": "RLO", "\u202c": "PDF", "\u2066": "LRI",
    chr(0xD83D): "\ufffdD83D", chr(0xDC4D): "\ufffdDC4D",
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(report, made, tmp_path_factory):
    return report(hostile_run(made["tiny"].path, tmp_path_factory.mktemp("hostile")))


def signs(text: str) -> str:
    """A text as the page has to show it: what no font draws is named. In JavaScript, as in UTF-16,
    a high and a low surrogate beside each other are one character; those of TEXTS are alone."""
    return "".join(AS_SIGNS.get(letter, letter) for letter in text)


@pytest.mark.parametrize("width", [1280, 400])
def test_hostile_texts_run_nothing_and_make_no_element(browser, hostile, report, made, width):
    browser.open(report(made["tiny"].path), width=width)
    scripts = browser.value(ELEMENTS, "script")
    for state in (f"{GROUP}", f"{GROUP}&colour=none&raw=1", "#rollouts?view=steps",
                  f"#rollouts?finish={NAME}&q={NAME}"):  # fmt: skip
        browser.open(hostile, state, width=width)
        assert browser.value(ELEMENTS, "script") == scripts
        assert browser.value(ELEMENTS, "img, iframe, object, embed, form") == 0
        assert browser.value(HANDLERS) == []
        assert browser.value("document.scrollingElement.scrollWidth") == width
        assert (browser.errors(), browser.requests()) == ([], [])
        assert browser.value("window.alerts") == []


@pytest.mark.parametrize("colour", ["none", "logprob"])
def test_hostile_texts_are_shown_as_text(browser, hostile, colour):
    """As blocks of text, and token by token."""
    browser.open(hostile, f"{GROUP}&colour={colour}")
    more = browser.driver.find_elements("css selector", ".ro-answers > .ro-more")
    browser.script("arguments[0].click()", more[0])
    for sample, (name, text) in enumerate(TEXTS.items()):
        shown = browser.value(SHOWN, sample)
        if text is not LONG:
            assert shown.endswith(signs(text)), name
            continue
        assert shown.count("x") >= 3000, "its beginning and end"
        assert shown.rstrip().endswith("xZ") and "Axxx" in shown
        assert "characters" in shown, "and how much there is of it"


def test_hostile_names_are_shown_as_text(browser, hostile):
    browser.open(hostile, "#configuration?settings=onerror")
    assert browser.value("document.querySelector('#headline h1').textContent").count(NAME)
    assert browser.value("document.title").count(NAME)
    rows = """[...document.querySelectorAll("#settings-table tbody tr:not([hidden])")].map(
        (row) => row.textContent)"""
    assert any(NAME in row and TEXTS["script"] in row for row in browser.value(rows))
    texts = browser.value("document.querySelector('#environment').textContent")
    assert TEXTS["end of the data"] in texts and f"{NAME} {TEXTS['attribute']}" in texts
    charts = browser.value(
        "[...document.querySelectorAll('#curves figure')].map((f) => f.textContent)"
    )
    assert sum(NAME in text for text in charts) == 2


DAMAGES = {what: (name, change) for what, name, change in damages()}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_directory_gives_a_page_that_says_what_is_missing(
    browser, report, made, tmp_path, what
):
    name, change = DAMAGES[what]
    shutil.copytree(made["tiny"].path, tmp_path / "run")
    change(tmp_path / "run")
    browser.open(report(tmp_path / "run"))
    assert browser.errors() == []
    said = browser.value(
        "[...document.querySelectorAll('#missing li')].map((li) => li.textContent)"
    )
    assert any(name.removesuffix(".gz") in sentence for sentence in said), said
    sections = browser.value("[...document.querySelectorAll('main > section')].map((s) => s.id)")
    assert len(sections) == 8
    curves = browser.value(ELEMENTS, "#curves path.line")
    assert (curves > 10) == (name != "metrics.jsonl" or "half" in what or "inside" in what
                             or "types" in what)  # fmt: skip
    assert "could not be drawn" not in browser.value("document.getElementById('report').innerText")


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    """A page of nothing would hide a misspelt name."""
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "holds no run"), ("absent", "is not a directory")):
        assert main([str(tmp_path / name), f"output={tmp_path / 'report.html'}"]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_has_only_begun_has_a_page(browser, report, made, tmp_path):
    """Its configuration is written before the first step."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(made["tiny"].path / "config.yaml", run)
    browser.open(report(run))
    assert browser.errors() == []
    said = browser.value("document.getElementById('missing').textContent")
    assert all(name in said for name in ("metrics.jsonl", "samples.jsonl", "environment.json"))
    assert browser.value("document.querySelectorAll('#settings-table tr').length") > 50
