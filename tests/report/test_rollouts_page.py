"""The rollout browser in Chromium: it lists, filters and colours what the samples file has."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hostile_runs import rows_of

from tools.report.thinning import rounded

Row = dict[str, Any]
COUNT = "document.getElementById('rollouts-count').textContent"
LISTED = "[...document.querySelectorAll('#rollouts-list [data-group]')].map((b) => b.dataset.group)"
DETAIL = "document.getElementById('rollouts-detail')"
TOKENS = """[...document.querySelectorAll(
    `#rollouts-detail [data-sample="${arguments[0]}"] .ro-turns .ro-t`)].map((token) => [
    token.textContent, token.className, getComputedStyle(token).backgroundColor])"""


def group_of(row: Row) -> str:
    return f"{row['split']}-{row['step']}-{row['prompt_id']}"


def counted(browser, rows: int, groups: int, of: int) -> None:
    """Wait until the browser says so: it filters a moment after the last key."""
    number = "rollout" if of == 1 else "rollouts"
    said = f"{rows} {number}" if rows == of else f"{rows} of {of} {number}"
    browser.wait_for(f"{COUNT}.startsWith(`{said} in {groups} group`)", seconds=3)


def choose(browser, key: str, text: str) -> None:
    """Type into a filter, or choose an entry of its list, as a reader does."""
    from selenium.webdriver.support.ui import Select

    field = browser.driver.find_element("id", f"rollouts-{key}")
    if field.tag_name == "select":
        Select(field).select_by_value(text)
    else:
        field.clear()
        field.send_keys(text)


FILTERS: list[tuple[dict[str, str], Callable[[Row], bool]]] = [
    ({"step": "2"}, lambda row: row["step"] == 2),
    ({"step": "1-2, 5"}, lambda row: row["step"] in (1, 2, 5)),
    ({"finish": "length"}, lambda row: row["finish_reason"] == "length"),
    ({"min": "1"}, lambda row: row["reward"] >= 1),
    ({"max": "0.5"}, lambda row: row["reward"] <= 0.5),
    ({"kept": "best"}, lambda row: row["chosen"] == "best"),
    ({"kept": "best", "min": "1"}, lambda row: row["chosen"] == "best" and row["reward"] >= 1),
    ({"q": "EA"}, lambda row: "ea" in text_of(row)),
    ({"q": "nowhere"}, lambda row: False),
    ({"split": "eval"}, lambda row: row["split"] == "eval"),
    ({"step": "8", "finish": "stop", "q": "a"},
     lambda row: row["step"] == 8 and row["finish_reason"] == "stop" and "a" in text_of(row)),
]  # fmt: skip


def text_of(row: Row) -> str:
    turns = [turn["text"] for turn in row.get("turns") or []]
    return "\n".join([row["prompt"], row["response"], *turns, str(row.get("answer", ""))]).lower()


@pytest.mark.parametrize(("filters", "keeps"), FILTERS, ids=[str(given) for given, _ in FILTERS])
def test_filters_find_the_rollouts_of_the_samples(browser, report, made, filters, keeps):
    rows = rows_of(made["diverged"].path)
    wanted = [row for row in rows if keeps(row)]
    assert (len(wanted) < len(rows)) and (bool(wanted) == (filters != {"q": "nowhere"}))
    browser.open(report(made["diverged"].path), "#rollouts")
    counted(browser, len(rows), len(set(map(group_of, rows))), len(rows))
    for key, text in filters.items():
        choose(browser, key, text)
    groups = {group_of(row) for row in wanted}
    counted(browser, len(wanted), len(groups), len(rows))
    listed = browser.value(LISTED)
    assert set(listed) <= groups and len(listed) == min(len(groups), 60)
    address = browser.value("location.href")
    assert all(f"{key}=" in address for key in filters)
    browser.open(address)
    counted(browser, len(wanted), len(groups), len(rows))
    browser.driver.find_element("id", "rollouts-clear").click()
    counted(browser, len(rows), len(set(map(group_of, rows))), len(rows))
    assert browser.errors() == []


def test_the_text_filter_looks_into_solutions(browser, report, made):
    rows = rows_of(made["diverged"].path)
    said = {row["answer"]: row["prompt"] + row["response"] for row in rows}
    text = next(answer for answer in said if answer not in said[answer] and len(answer) > 2)
    wanted = [row for row in rows if text in text_of(row)]
    browser.open(report(made["diverged"].path), f"#rollouts?q={text}")
    counted(browser, len(wanted), len(set(map(group_of, wanted))), len(rows))


def some_row(rows: list[Row], keeps: Callable[[Row], bool]) -> Row:
    return next(row for row in rows if row["split"] == "train" and keeps(row))


PROBABILITIES = (0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01, 0.001)
SIZES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1)
VALUES: dict[str, Callable[[Row], list[float]]] = {  # of the sampled tokens
    "logprob": lambda row: row["logprobs"],
    "advantage": lambda row: [row["advantage"]] * len(row["logprobs"]),
    "difference": lambda row: row["logprob_diffs"],
    "entropy": lambda row: row["entropies"],
}


def shown_values(row: Row, colour: str) -> list[float]:
    """As the page has them: in three digits."""
    return [float(rounded(value)) for value in VALUES[colour](row)]


def end_of_scale(rows: list[Row], colour: str) -> float:
    """What 99% of the run's tokens are below; each answer has one advantage."""
    found = sorted(
        abs(value)
        for row in rows
        if row["split"] == "train"
        for value in shown_values(row, colour)[: 1 if colour == "advantage" else None]
    )
    return float(f"{found[min(len(found) - 1, math.floor(0.99 * len(found)))]:.2g}")


def level_of(value: float, colour: str, end: float) -> int:
    if colour == "logprob":
        return sum(math.exp(value) < bound for bound in PROBABILITIES)
    if colour == "difference":
        return 1 + sum(abs(value) >= bound for bound in SIZES) if value else 0
    return min(8, math.ceil(8 * abs(value) / end - 1e-9))


@pytest.mark.parametrize("colour", VALUES)
def test_tokens_are_coloured_by_the_numbers_of_the_samples(browser, report, made, colour):
    """One span per token, at its level of a scale that the run has once."""
    rows = rows_of(made["tiny"].path)
    end = end_of_scale(rows, colour)
    kept = [row for row in rows if row["split"] == "train" and row["advantage"]]
    row = max(
        kept, key=lambda row: len({level_of(x, colour, end) for x in shown_values(row, colour)})
    )
    browser.open(report(made["tiny"].path), f"#rollouts?group={group_of(row)}&answer=all")
    browser.driver.find_element("css selector", f"[data-colour={colour}]").click()
    tokens = browser.value(TOKENS, row["sample_id"])
    assert len(tokens) == len(row["token_texts"]) == len(row["logprobs"])
    values = shown_values(row, colour)
    wanted = [level_of(value, colour, end) for value in values]
    found = [re.search(r"\bl(\d)", name) for _, name, _ in tokens]
    assert [int(one[1]) if one else 0 for one in found] == wanted and any(wanted)
    assert len(set(wanted)) > 2 or colour in ("advantage", "difference")
    assert len({ground for *_, ground in tokens}) == len({name for _, name, _ in tokens})
    above = [bool(one) and value > 0 for one, value in zip(found, values, strict=True)]
    if colour in ("advantage", "difference"):
        assert ["above" in name for _, name, _ in tokens] == above
    legend = browser.value("document.querySelector('.ro-legend').dataset.measure")
    assert legend == colour


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_level_has_a_shade_of_its_own(browser, report, made, theme):
    browser.open(report(made["tiny"].path), "#rollouts", theme=theme)
    shades = browser.script("""
        const box = document.querySelector("#rollouts-detail .ro-turns");
        const shadeOf = (name) => {
            const token = document.createElement("span");
            token.className = name;
            box.append(token);
            return getComputedStyle(token).backgroundColor;
        };
        return ["", " above"].flatMap((end) => [1, 2, 3, 4, 5, 6, 7, 8].map(
            (level) => shadeOf(`ro-t l${level}${end}`))).concat(shadeOf("ro-t"))""")
    assert len(set(shades)) == 17


def test_tokens_of_a_reply_have_no_number(browser, report, made):
    """Those that the model sampled before and after it have their own."""
    row = some_row(rows_of(made["calculator"].path), lambda row: len(row.get("turns") or []) > 2)
    browser.open(report(made["calculator"].path), f"#rollouts?group={group_of(row)}&colour=logprob")
    tokens = browser.value(TOKENS, row["sample_id"])
    sampled = [t["sampled"] for t in row["turns"] for _ in range(t["num_tokens"])]
    assert len(tokens) == len(sampled) and not all(sampled) and sampled[-1]
    numbers = iter(shown_values(row, "logprob"))
    wanted = [level_of(next(numbers), "logprob", 0) if own else 0 for own in sampled]
    found = [re.search(r"\bl(\d)", name) for _, name, _ in tokens]
    assert [int(one[1]) if one else 0 for one in found] == wanted
    assert ["ro-given" in name for _, name, _ in tokens] == [not own for own in sampled]


def test_a_group_is_shown_whole_with_rewards_and_advantages(browser, report, made):
    rows = rows_of(made["tiny"].path)

    def members(row: Row) -> list[Row]:
        found = [one for one in rows if group_of(one) == group_of(row)]
        return sorted(found, key=lambda one: one["sample_id"])

    def lopsided(row: Row) -> bool:
        rewards = [one["reward"] for one in members(row)]
        return rewards != rewards[::-1]

    row = some_row(rows, lopsided)  # the other way round it would be another list
    group = members(row)
    browser.open(report(made["tiny"].path), f"#rollouts?group={group_of(row)}&colour=none")
    assert len(group) == 8
    for one in group:
        answer = f"""document.querySelector(
            '#rollouts-detail [data-sample="{one["sample_id"]}"]')"""
        turn = browser.value(f"{answer}.querySelector('.ro-turns .ro-turn:last-child').textContent")
        assert one["response"] in turn
        shown = browser.value(f"{answer}.querySelector('[data-value=reward]').textContent")
        assert float(shown) == one["reward"]
        assert f"{abs(one['advantage']):.3g}" in browser.value(f"{answer}.textContent")
    assert row["prompt"] in browser.value(f"{DETAIL}.querySelector('.ro-prompt').textContent")
    order = browser.value(
        f"[...{DETAIL}.querySelectorAll('[data-sample]')].map((n) => n.dataset.sample)"
    )
    assert list(map(int, order)) == list(range(8))
    strip = f"""document.querySelector(
        '#rollouts-list [data-group="{group_of(row)}"] .ro-strip').getAttribute('aria-label')"""
    rewards = browser.value(strip).removeprefix("rewards ").split(", ")
    in_order = [one["reward"] for one in group]
    assert list(map(float, rewards)) == pytest.approx(in_order, abs=1e-3)


SORTS: dict[str, Callable[[list[Row]], float]] = {
    "step": lambda group: group[0]["step"],
    "-step": lambda group: -group[0]["step"],
    "reward": lambda group: math.fsum(row["reward"] for row in group) / len(group),
    "-reward": lambda group: -math.fsum(row["reward"] for row in group) / len(group),
    "length": lambda group: -math.fsum(row["length"] for row in group) / len(group),
}


@pytest.mark.parametrize("sort", SORTS)
def test_groups_are_sorted(browser, report, made, sort):
    rows = [row for row in rows_of(made["tiny"].path) if row["split"] == "train"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    browser.open(report(made["tiny"].path), f"#rollouts?split=train&sort={sort}")
    counted(browser, len(rows), len(groups), len(rows_of(made["tiny"].path)))
    keys = [SORTS[sort](groups[name]) for name in browser.value(LISTED)]
    assert len(set(keys)) > 4 and keys == pytest.approx(
        sorted(map(SORTS[sort], groups.values()))[: len(keys)]
    )


def test_conversations_are_turns_with_the_replies_of_tools(browser, report, made):
    row = some_row(rows_of(made["calculator"].path), lambda row: len(row.get("turns", [])) > 2)
    browser.open(report(made["calculator"].path), f"#rollouts?group={group_of(row)}&colour=none")
    turns = browser.value(
        """[...document.querySelectorAll(
        `#rollouts-detail [data-sample="${arguments[0]}"] .ro-turn`)].map(
        (turn) => [turn.dataset.role, turn.lastChild.textContent])""",
        row["sample_id"],
    )
    roles = ["answer" if turn["sampled"] else "reply of the task" for turn in row["turns"]]
    assert [role for role, _ in turns] == roles
    for (_, shown), turn in zip(turns, row["turns"], strict=True):
        assert turn["text"].rstrip("\n") in shown


def test_steps_show_their_best_and_worst_group(browser, report, made):
    browser.open(report(made["tiny"].path), "#rollouts?view=steps")
    cells = browser.value("""[...document.querySelectorAll(".ro-step-line[data-step]")].map(
        (line) => [Number(line.dataset.step), ...["best", "worst"].map(
            (kind) => line.querySelector(`[data-kind=${kind}]`).dataset.group)])""")
    rows = [row for row in rows_of(made["tiny"].path) if row["split"] == "train"]
    for step, *shown in cells:
        for kind, group in zip(("best", "worst"), shown, strict=True):
            chosen = {group_of(r) for r in rows if r["step"] == step and r["chosen"] == kind}
            assert chosen == {group}
    assert sorted(step for step, *_ in cells) == sorted({row["step"] for row in rows})


def test_an_evaluation_question_is_shown_through_time(browser, report, made):
    rows = [row for row in rows_of(made["tiny"].path) if row["split"] == "eval"]
    times = Counter(row["prompt_id"] for row in rows if row["sample_id"] == -1)
    evaluated = [line["step"] for line in made["tiny"].metrics if "eval/accuracy" in line]
    prompt, count = times.most_common(1)[0]
    assert count == len(evaluated) == 4
    browser.open(report(made["tiny"].path), f"#rollouts?view=questions&question={prompt}&times=all")
    columns = browser.value(
        f"[...{DETAIL}.querySelectorAll('.ro-column')].map((c) => c.dataset.step)"
    )
    assert list(map(int, columns)) == evaluated
    texts = browser.value(f"[...{DETAIL}.querySelectorAll('.ro-column')].map((c) => c.textContent)")
    for step, text in zip(evaluated, texts, strict=True):
        (greedy,) = [
            r for r in rows if (r["step"], r["prompt_id"], r["sample_id"]) == (step, prompt, -1)
        ]
        assert greedy["response"] in text


def test_groups_are_walked_with_j_and_k_and_tokens_with_arrows(browser, report, made):
    from selenium.webdriver.common.keys import Keys

    browser.open(report(made["tiny"].path), "#rollouts?sort=step&split=train")
    shown = f"{DETAIL}.querySelector('.ro-group').dataset.group"
    order = browser.value(LISTED)
    assert browser.value(shown) == order[0]
    browser.press("j", "j", "k")
    assert browser.value(shown) == order[1]
    tokens = browser.driver.find_element("css selector", "#rollouts-detail .ro-tokens")
    browser.script("arguments[0].focus()", tokens)
    browser.press(Keys.HOME, Keys.ARROW_RIGHT)
    rows = [row for row in rows_of(made["tiny"].path) if group_of(row) == order[1]]
    first = min(rows, key=lambda row: row["sample_id"])
    tip = browser.value("document.getElementById('rollout-token').innerText")
    assert f"2 of {len(first['token_texts'])}" in tip
    browser.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    tip = browser.value("document.getElementById('rollout-token').innerText")
    assert f"1 of {len(first['token_texts'])}" in tip, "it stays at the first"
    browser.press(Keys.ESCAPE)
    assert browser.value("document.getElementById('rollout-token').hidden")
