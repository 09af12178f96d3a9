"""Judges: the tables of docs/judges.md, row by row, and what is refused before they are asked."""

from __future__ import annotations

import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from docs_reading import tables

from mesh.tasks import judges
from mesh.tasks.judges import JUDGES, Judge, in_box, judge_named, settings_of
from mesh.tasks.numerals import last_number, number_of, numbers_in
from mesh.tasks.response import Response

PAGE = Path("docs/judges.md")


def cases() -> list[tuple[str, str, str, str]]:
    """(judge, answer, response, verdict) of the page's tables."""
    found = []
    for header, *rows in tables(PAGE):
        if header[:2] != ["answer", "response"]:
            continue
        for answer, response, *verdicts in rows:
            texts = [cell.strip("`").replace("⏎", "\n") for cell in (answer, response)]
            found += [(name, *texts, v) for name, v in zip(header[2:], verdicts, strict=True)]
    return found


def verdict(judge: Judge, answer: str, response: str) -> str:
    if judge.answer_problem(answer):
        return "-"
    score = judge.score(answer, Response(response))
    assert score.correct is (score.reward == 1.0)
    return f"{score.reward:g}"


@pytest.mark.parametrize("name", ["exact", "number", "gsm8k", "boxed", "math", "choice"])
def test_the_tables_of_the_page_are_what_the_judges_say(name):
    mine = [case for case in cases() if case[0] == name]
    assert len(mine) > 20
    wrong = [case for case in mine if verdict(JUDGES[name], *case[1:3]) != case[3]]
    assert not wrong


@pytest.mark.parametrize(
    "name, response, has",
    [
        ("number", "about five", 0),
        ("number", "about 5", 1),
        ("gsm8k", "72", 0),
        ("gsm8k", "#### 70", 1),
        ("boxed", "\\boxed{3", 0),
        ("boxed", "\\boxed{4}", 1),
        ("choice", "no idea", 0),
        ("math", "", 0),
    ],
)
def test_the_part_format_says_that_the_form_was_found_right_or_wrong(name, response, has):
    answer = "B" if name == "choice" else "72"
    score = JUDGES[name].score(answer, response)
    assert score.parts == {"format": float(has)} and score.reward == 0.0
    assert judges.exact("a", "b").parts == {}


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("2,500 and 2.50 or -3", ["2500", "5/2", "-3"]),
        ("3-5, 3 - 5, 3\u20135, = -5, (-5), -$5", ["3", "5", "3", "5", "3", "5", "-5", "-5", "-5"]),
        ("1/2 1 1/2 -\\tfrac{3}{4} 2\\frac{1}{2}", ["1/2", "3/2", "-3/4", "5/2"]),
        ("1e3 1.5E-2 2 x 10^3 2 \\times 10^{-3}", ["1000", "3/200", "2000", "1/500"]),
        ("CO2 v1.5 1.2.3 so...7, 1/0", ["6/5", "7"]),
        ("1,0000 1,000, 12,34", ["1", "0", "1000", "12", "34"]),
        ("9" * 1001 + " 1e1001 " + "8" * 1000, ["8" * 1000]),
        ("\uff15 \u0665", []),  # digits of other scripts
    ],
)
def test_numbers_are_read_exactly(text, numbers):
    assert numbers_in(text) == [Fraction(number) for number in numbers]
    assert last_number(text) == (Fraction(numbers[-1]) if numbers else None)


@pytest.mark.parametrize(
    "text, number",
    [("$1,000.50", "2001/2"), ("-$5", "-5"), ("50\\%", "50"), (" 72. ", "72"), ("- 5", None),
     ("x=5", None), ("5 apples", None), ("1e99999", None), ("", None)],
)  # fmt: skip
def test_a_text_that_is_a_number(text, number):
    assert number_of(text) == (None if number is None else Fraction(number))


def test_the_last_box_that_is_closed_counts_with_the_braces_in_it():
    assert in_box("\\boxed{\\frac{1}{2}} x \\boxed{ a_{b_{c}} } \\boxed{") == "a_{b_{c}}"
    assert in_box("\\boxed{1 \\} 2}") == "1 \\} 2" and in_box("\\fbox {x}") == "x"
    assert in_box("} \\boxed{\\boxed{3}} {") == "3"
    assert in_box("boxed{3} \\boxed 3") is None


@pytest.mark.parametrize("name", ["exact", "number", "gsm8k", "boxed", "choice"])
def test_no_response_takes_long(name):
    """Those of `apart` have a time limit, in a process of their own."""
    pieces = ["\\boxed{", "A ", "####\n", "1 ", "1,", "(", "answer ", "answer: *", " ", "\\", "*",
              "9", "1/", ". ", "5 x ", "\\frac{1}{", "answer" + " " * 999, "\n"]  # fmt: skip
    assert not JUDGES[name].apart
    started = time.process_time()
    for piece in pieces:
        JUDGES[name].score("B" if name == "choice" else "5", piece * (40_000 // len(piece)))
    assert time.process_time() - started < 5


def test_regex_takes_the_last_match_and_its_group():
    judge = JUDGES["regex"].score
    assert judge("5", "a=4 a=5.0", pattern=r"a=([\d.]+)").reward == 1
    assert judge("5", "a=5 a=4", pattern=r"a=([\d.]+)").reward == 0
    assert judge("YES", "no, yes", pattern="yes|no", ignore_case=True).reward == 1
    assert judge("YES", "yes", pattern="yes|no").reward == 0
    assert judge("5", "b=5", pattern="a=5").parts == {"format": 0.0}
    assert judge("x", "a", pattern="a(b)?").reward == 0  # the group took no part


def chess(answer: str, response: str, *, depth: int = 3) -> float:
    """A judge of a user's own."""
    return float(len(response) > depth)


def test_a_judge_of_ones_own_is_found_and_its_settings_are_typed():
    judge = judge_named("test_judges:chess")
    assert judge.score is chess and judge.apart and not judge.answer_problem("")
    from mesh.config.text import Text

    assert settings_of("x", judge, {"depth": Text("5")}) == {"depth": 5}


@pytest.mark.parametrize(
    "name, args, message",
    [
        (
            "nmber",
            {},
            "task_args.judge=nmber: no such judge; did you mean number? use one of exact",
        ),
        ("test_judges:ches", {}, "test_judges has no function ches; did you mean chess?"),
        ("no_such_module:x", {}, "cannot import no_such_module"),
        ("regex", {}, "task_args.judge_args.pattern is missing: judge=regex needs it"),
        ("regex", {"pattern": "("}, "it is no regular expression (missing ), unterminated"),
        ("regex", {"pattern": "(a)(b)"}, "it has 2 groups; use (?:...)"),
        ("exact", {"ignorecase": True}, "did you mean ignore_case? it has ignore_case"),
        ("exact", {"ignore_case": 2}, "task_args.judge_args.ignore_case=2: expected bool, got int"),
        ("number", {"pattern": "a"}, "judge=number has no such setting; it takes none"),
    ],
)
def test_wrong_names_and_settings_are_refused(name, args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings_of(name, judge_named(name), args)


@pytest.mark.parametrize(
    "name, answer, problem",
    [
        ("number", "none", "it has no number"),
        ("number", "3 or 4", "it has 2 numbers"),
        ("number", "2\\sqrt{x}", "it is a formula, which judge=math reads"),
        ("number", "5 apples", ""),
        ("gsm8k", "24 + 48 = 72\n#### 72", ""),
        ("gsm8k", "24 + 48 = 72\n####", "it has no number"),
        ("choice", "Paris", "it names no letter"),
        ("choice", "(c)", ""),
        ("boxed", " ", "it is empty"),
        ("math", "", "math-verify reads no expression in it"),
        ("math", "x+1", ""),
    ],
)
def test_answers_that_a_judge_cannot_read(name, answer, problem):
    assert JUDGES[name].answer_problem(answer) == problem


@pytest.mark.parametrize(
    ("name", "settings", "responses", "answer"),
    [
        ("exact", {}, [" Paris \n", "Paris"], "Paris"),
        ("exact", {"ignore_case": True}, ["PARIS", "paris"], "paris"),
        ("number", {}, ["it is $1,000.00.", "first 3, then 1000"], "1000"),
        ("number", {}, ["1/2", "0.50", "that makes \\frac{1}{2}"], "1/2"),
        ("gsm8k", {}, ["24 + 48\n#### 72", "#### 72.0 apples"], "72"),
        ("boxed", {}, ["\\boxed{0.5}", "\\boxed{\\frac{1}{2}}"], "1/2"),
        ("boxed", {}, ["\\boxed{\\dfrac{x}{2}}", "\\boxed{ \\frac{x}{2} }"], "\\frac{x}{2}"),
        ("choice", {}, ["The answer is B", "(b)", "B. Paris"], "B"),
        ("regex", {"pattern": "= (.*)"}, ["x = 3.0", "x = 3"], "3"),
        ("math", {}, ["\\boxed{x+1}", "\\boxed{1+x}"], "x + 1"),
    ],
)
def test_responses_that_say_the_same_vote_for_one_answer(name, settings, responses, answer):
    scores = [JUDGES[name].score("7", response, **settings) for response in responses]
    assert [score.answer for score in scores] == [answer] * len(responses)


@pytest.mark.parametrize("name", ["number", "gsm8k", "boxed", "choice", "regex", "math"])
def test_a_response_without_an_answer_has_no_vote(name):
    settings = {"pattern": "= (.*)"} if name == "regex" else {}
    score = JUDGES[name].score("7", "?", **settings)
    assert score.answer == "" and not score.correct
