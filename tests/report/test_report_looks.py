"""What screenshots of the fixture runs once showed to be wrong: words broken in two, lines hidden
under others, legends of another dash, rungs and tables that a phone showed badly.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mesh.runs.samples import read_samples

BROKEN_WORDS = (Path(__file__).parent / "looks.js").read_text()
BROKEN_LABELS = """
const nodes = [...document.querySelectorAll(arguments[0])];
const lines = (node) => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size;
};
const broken = nodes.filter((node) => lines(node) > 1).map((node) => node.innerText);
return {looked: nodes.length, broken};
"""
COMPARED = ("tiny", "collapsed", "diverged")
TOP = "document.querySelector('{}').getBoundingClientRect().top"


@pytest.fixture
def compared(report, made):
    return report(*(made[name].path for name in COMPARED))


@pytest.mark.parametrize("width", [400, 1280])
def test_words_of_cards_and_findings_are_whole(browser, compared, width):
    browser.open(compared, width=width)
    seen = browser.script(BROKEN_WORDS, ".fact, .finding, .legend, .run header, .rungs")
    assert seen["looked"] > 200
    assert seen["broken"] == []


def test_runs_of_one_name_are_told_apart_by_their_parent(browser, compared):
    browser.open(compared)
    names = browser.value("[...document.querySelectorAll('#headline h2')].map((h) => h.innerText)")
    assert names == [f"{name}/run" for name in COMPARED]


LINES = """[...document.querySelectorAll(`[data-chart=${arguments[0]}] path.line`)].map((path) =>
    [path.getAttribute("d"), path.getAttribute("stroke-dasharray"),
     path.getAttribute("stroke-dashoffset")])"""


def test_equal_lines_take_turns_so_that_each_is_seen(browser, report, made):
    browser.open(report(made["tiny"].path))
    (one, *first), (other, *second) = browser.value(LINES, "tokens")
    assert one == other, "all tokens are trained on"
    assert (first, second) == ([None, None], ["7 7", "-7"])
    (one, *first), (other, *second) = browser.value(LINES, "length")
    assert one != other and first == second == ["", None]


def test_intervals_of_equal_lines_are_drawn_once(browser, report, made):
    browser.open(report(made["collapsed"].path))
    bands = "document.querySelectorAll('[data-chart=eval-accuracy] path.band').length"
    assert (
        browser.value("document.querySelectorAll('[data-chart=eval-accuracy] path.line').length")
        == 5
    )
    assert browser.value(bands) == 1


def test_a_small_chart_of_several_runs_has_the_intervals_of_its_first_metric(browser, compared):
    """The large one has those of all lines that are not equal to another."""
    keys = """[...document.querySelectorAll("[data-chart=eval-accuracy] path.band")].map((band) =>
        band.parentNode.querySelector(".line").dataset.key)"""
    browser.open(compared)
    assert set(browser.value(keys)) == {"eval/accuracy"}
    browser.open(compared, "#curves?zoom=eval-accuracy")
    assert {"eval/accuracy", "eval/accuracy_greedy"} < set(browser.value(keys))


def test_a_legend_has_the_dash_of_its_line(browser, compared):
    browser.open(compared)
    samples = browser.value("""[...document.querySelectorAll(
        "[data-chart=eval-accuracy] .legend li")].map((row) => [row.dataset.key,
        row.querySelector("svg.stroke path").getAttribute("stroke-dasharray")])""")
    lines = browser.value("""[...document.querySelectorAll(
        "[data-chart=eval-accuracy] path.line:not([stroke-dasharray^='7 '])")].map((path) =>
        [path.dataset.key, path.getAttribute("stroke-dasharray")])""")
    assert len({dash for _, dash in samples}) == len(samples) == 5
    shown = [(key, dash) for key, dash in lines if dash]
    assert len(shown) > 2 and all(dash == dict(samples)[key] for key, dash in shown)


def test_every_chart_names_its_lower_axis(browser, report, made):
    browser.open(report(made["split"].path), width=400)
    named = browser.value("""[...document.querySelectorAll("figure.chart > svg")].map((svg) => {
        const name = svg.querySelector("text.axis"), frame = svg.getBoundingClientRect();
        const first = [...svg.querySelectorAll(".axes text:not(.axis)")]
            .filter((text) => text.getAttribute("y") === name.getAttribute("y"))[0];
        const box = name.getBoundingClientRect();
        return [name.textContent, box.left >= frame.left - 1,
                box.right <= first.getBoundingClientRect().left]})""")
    assert len(named) > 20
    assert named == [["step", True, True]] * len(named)


def test_a_rung_and_its_state_begin_one_line_on_a_phone(browser, report, made):
    browser.open(report(made["tiny"].path), width=400)
    rungs = browser.value("""[...document.querySelectorAll(".rungs li")].map((row) => {
        const [name, promise, holds, how] = ["strong", ".promise", ".pill", ".how"].map((part) =>
            row.querySelector(part).getBoundingClientRect());
        return [Math.abs(name.top - promise.top) < 6, Math.abs(holds.top - name.top) < 6,
                name.right <= promise.left, promise.right <= holds.left,
                how.top >= promise.bottom, Math.abs(how.left - promise.left) < 1]})""")
    assert len(rungs) == 7
    assert rungs == [[True] * 6] * 7


@pytest.mark.parametrize("name", ["resumed", "calculator"])
def test_configuration_and_environment_fit_a_phone(browser, report, made, name):
    browser.open(report(made[name].path), width=400)
    frames = browser.value("""[...document.querySelectorAll(
        "#configuration .scroll, #environment .scroll")].map((frame) =>
        [frame.scrollWidth, frame.clientWidth])""")
    assert len(frames) == 2 and all(wide <= room for wide, room in frames), frames
    shown = browser.value("""[...document.querySelectorAll("#settings-table tbody tr")].map((row) =>
        row.querySelector(".help").getBoundingClientRect().right)""")
    assert len(shown) > 100 and max(shown) <= 400


def test_the_names_of_results_stay_when_a_wide_table_moves(browser, compared):
    browser.open(compared, width=400)
    places = browser.value("""(() => {
        const frame = document.querySelector("#comparison .scroll");
        const name = () => frame.querySelector("tbody th").getBoundingClientRect().left;
        const before = name();
        frame.scrollLeft = 80;
        return [frame.scrollLeft, before, name()]})()""")
    assert places[0] == 80 and places[1] == places[2]


def test_a_tap_keeps_the_values_of_a_step(browser, report, made):
    """A finger that has left the chart points at nothing any more."""
    browser.open(report(made["tiny"].path), width=400)
    reading = "document.querySelector('[data-chart=reward] .reading').textContent"
    last, third = (made["tiny"].metrics[step]["reward/mean"] for step in (-1, 3))
    assert float(browser.value(reading)) == pytest.approx(last, rel=1e-3)
    browser.script("""
        const svg = document.querySelector("[data-chart=reward] svg");
        const box = svg.getBoundingClientRect();
        const dots = svg.querySelector("path.dots").getAttribute("d").split("M").slice(1);
        const x = box.left + Number(dots[2].split(" ")[0]) * box.width / svg.viewBox.baseVal.width;
        const where = {clientX: x, clientY: box.top + 20, pointerType: "touch", bubbles: true};
        for (const name of ["pointerdown", "pointerup", "pointerleave"])
            svg.dispatchEvent(new PointerEvent(name, where));""")
    assert browser.value("location.hash").endswith("mark=3")
    browser.wait_for(f"Math.abs(Number({reading}) - {third}) < 1e-3")


def test_the_timeline_names_the_roles_of_ranks_on_a_phone(browser, report, made):
    browser.open(report(made["split"].path), width=400)
    labels = browser.value(
        "[...document.querySelectorAll('svg.gantt text')].map((t) => t.textContent)"
    )
    assert labels.count("0 trainer") == labels.count("1 generator") == 1


def test_a_greedy_answer_is_in_no_mean(browser, report, made):
    """An evaluation question whose greedy answer has another reward than a sampled one."""
    rows = [row for row in read_samples(made["tiny"].path) if row["split"] == "eval"]
    groups: dict[tuple[int, int], dict[int, dict]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt_id"]), {})[row["sample_id"]] = row
    (step, prompt), group = next(
        (place, group) for place, group in groups.items()
        if -1 in group and {row["reward"] for row in group.values()} == {0.0, 1.0}
        and group[-1]["reward"] != group[0]["reward"]
    )  # fmt: skip
    sampled = [row for sample, row in group.items() if sample >= 0]
    browser.open(report(made["tiny"].path), f"#rollouts?group=eval-{step}-{prompt}")
    facts = browser.value("""Object.fromEntries([...document.querySelectorAll("[data-fact]")].map(
        (fact) => [fact.dataset.fact, fact.querySelector("dd").textContent]))""")
    right = sum(row["correct"] for row in sampled)
    assert facts["correct"] == f"{right} of {len(sampled)}"
    assert float(facts["reward"]) == pytest.approx(sum(r["reward"] for r in sampled) / len(sampled))
    assert facts["greedy"] == f"reward {group[-1]['reward']:.0f}"


def test_a_resumed_run_shows_the_steps_of_its_last_start(browser, report, made):
    browser.open(report(made["resumed"].path))
    steps = "document.querySelector('#settings-table tr[data-key=steps] td.value').innerText"
    done = made["resumed"].metrics[-1]["step"]
    assert browser.value(steps) == f"{done}, first 1000"


def test_numbers_have_one_minus_sign(browser, report, made):
    browser.open(report(made["tiny"].path))
    assert browser.value("Report.number(-1.04e-8)") == "\u22121.04e\u22128"


def test_a_damaged_run_is_not_said_to_be_without_problems(browser, report, made, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(made["tiny"].path, damaged)
    (damaged / "timeline.jsonl").write_text("{")
    browser.open(report(damaged))
    said = browser.value("document.querySelector('#findings .body').innerText")
    assert said == "No problem was found in what could be read of the run."


def test_labels_and_units_stay_on_one_line(browser, compared, report, made):
    """A label of the environment on a wide screen, a number with its unit on any."""
    browser.open(report(made["resumed"].path))
    labels = browser.script(BROKEN_LABELS, "#environment th")
    assert labels["looked"] > 15 and labels["broken"] == []
    browser.open(compared, width=400)
    numbers = browser.script(BROKEN_LABELS, "#speed td.number")
    assert numbers["looked"] > 20 and numbers["broken"] == []
