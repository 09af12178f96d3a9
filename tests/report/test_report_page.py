"""The report page of real runs in Chromium: it loads, draws, fits a phone, is dark where
asked, asks nobody, and is used from the keyboard.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
from page_reading import LOW_CONTRAST
from shown_runs import NAMES

SECTIONS = ["headline", "findings", "curves", "speed", "timeline", "rollouts", "configuration",
            "environment"]  # fmt: skip
POINTS = """[...document.querySelectorAll(`path.${arguments[0]}[data-key]`)].map(
    (path) => [path.dataset.key, Number(path.dataset.points)])"""
WIDTH = "document.scrollingElement.scrollWidth"
PAGE_GROUND = "getComputedStyle(document.body).backgroundColor"
LEAST_CONTRAST = 4.5


def is_sound(browser) -> None:
    """No error, no dialog, no request."""
    assert browser.errors() == []
    assert browser.value("window.alerts") == []
    assert browser.requests() == []


@pytest.mark.parametrize("name", NAMES)
def test_page_loads_without_errors_and_asks_nobody(browser, report, made, name):
    browser.open(report(made[name].path))
    sections = browser.value("[...document.querySelectorAll('main > section')].map((s) => s.id)")
    assert sections == SECTIONS
    assert browser.value("document.querySelectorAll('#curves path.line').length") > 10
    is_sound(browser)


@pytest.mark.parametrize("name", NAMES)
def test_curves_have_a_point_for_every_number_of_the_metrics(browser, report, made, name):
    """A phase is a stack with a part for every line that times any, 0 where it did not happen; a
    sync has a curve as well. Texts, such as digests, have none."""
    browser.open(report(made[name].path))
    wanted = Counter(
        key
        for line in made[name].metrics
        for key, value in line.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    )
    phases = {key for key in wanted if key.startswith("seconds/")}
    lines = [(key, n) for key, n in browser.value(POINTS, "line") if not key.startswith("waiting/")]
    stacks = browser.value(POINTS, "stack")
    assert len(dict(lines)) == len(lines) and len(dict(stacks)) == len(stacks) == len(phases) > 3
    assert dict(lines) == {
        key: n for key, n in wanted.items() if key not in phases - {"seconds/sync"}
    }
    timed = sum(any(key in phases for key in line) for line in made[name].metrics)
    assert dict(stacks) == dict.fromkeys(phases, timed)


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_shows_the_page_without_scrolling_sideways(browser, report, made, name):
    browser.open(report(made[name].path), width=400)
    assert browser.value("innerWidth") == 400
    assert browser.value(WIDTH) == 400
    is_sound(browser)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["collapsed", "calculator", "split"])
def test_text_is_readable_in_both_themes(browser, report, made, name, theme):
    browser.open(report(made[name].path), theme=theme)
    seen = browser.script(LOW_CONTRAST, LEAST_CONTRAST)
    assert seen["looked"] > 200
    assert seen["found"] == []


def test_dark_mode_follows_the_system_and_the_reader(browser, report, made):
    page = report(made["tiny"].path)
    grounds = {}
    for theme in ("light", "dark"):
        browser.open(page, theme=theme)
        grounds[theme] = browser.value(PAGE_GROUND)
    assert grounds["light"] != grounds["dark"]
    browser.driver.find_element("id", "theme").click()
    assert "theme=light" in browser.value("location.hash")
    assert browser.value(PAGE_GROUND) == grounds["light"]
    browser.open(page, "#headline?theme=dark")
    assert browser.value(PAGE_GROUND) == grounds["dark"]


def test_a_chart_is_read_and_a_step_marked_from_the_keyboard(browser, report, made):
    from selenium.webdriver.common.keys import Keys

    browser.open(report(made["tiny"].path))
    chart = browser.driver.find_element("css selector", "[data-chart=reward] svg")
    browser.script("arguments[0].focus()", chart)
    browser.press(Keys.HOME, Keys.ARROW_RIGHT)
    second = made["tiny"].metrics[2]
    assert (second["step"], "reward/mean" in second) == (2, True)
    said = browser.value("document.getElementById('said').textContent")
    assert said.startswith("Step 2: ")
    assert float(said.split()[-1]) == pytest.approx(second["reward/mean"], rel=1e-3)
    browser.press(Keys.ENTER)
    assert browser.value("location.hash").endswith("mark=2")
    assert browser.value("document.getElementById('mark').textContent").startswith("step 2")


def test_everything_that_is_clicked_is_reached_with_the_tab_key(browser, report, made):
    """Each stop shows a focus ring, and no stop keeps the focus."""
    from selenium.webdriver.common.keys import Keys

    browser.open(report(made["tiny"].path))
    reached = []
    for _ in range(40):
        browser.press(Keys.TAB)
        reached.append(
            browser.script("""
            const at = document.activeElement, style = getComputedStyle(at);
            return [at.tagName, at.outerHTML.slice(0, 80), at.matches(":focus-visible"),
                    (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0)
                    || style.boxShadow !== "none"]""")
        )
    assert len({html for _, html, *_ in reached}) > 30
    assert all(visible and ring for _, _, visible, ring in reached), reached
    assert {"A", "BUTTON", "svg", "SELECT"} <= {tag for tag, *_ in reached}


def test_two_runs_are_drawn_over_each_other(browser, report, made):
    browser.open(report(made["tiny"].path, made["collapsed"].path))
    drawn = browser.value("""[...document.querySelectorAll("[data-chart=reward] path.line")].map(
        (path) => [path.dataset.run, Number(path.dataset.points)])""")
    assert drawn == [
        ["0", len(made["tiny"].metrics) - 1],
        ["1", len(made["collapsed"].metrics) - 1],
    ]
    tones = browser.value("""[...document.querySelectorAll("[data-chart=reward] path.line")].map(
        (path) => getComputedStyle(path).stroke)""")
    assert len(set(tones)) == 2
    assert browser.value("document.querySelectorAll('#headline article').length") == 2
    rows = browser.value("""[...document.querySelectorAll("#comparison table")].at(-1).innerText""")
    assert "trainer.lr" in rows and "0.003" in rows
    is_sound(browser)


def test_smoothing_is_over_steps_where_a_curve_has_fewer_points(browser, report, made):
    browser.open(report(made["tiny"].path))
    mean = "Report.runningMean([1, 2, 3, 10, 20, 30], [3, 6, 9, 12, 15, 18], 5)"
    assert browser.value(mean) == [3, 6, 6, 12, 15, 18]
    mean = "Report.runningMean([1, 2, 3, 4, 5], [3, null, 9, 12, 15], 5)"
    assert browser.value(mean) == [3, None, 9.75, 12, 15]
