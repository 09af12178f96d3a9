"""The conversations that ship: calculator and guess, played by their own solutions and by others.

Costs about 2 s.
"""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mesh.tasks import load_task
from mesh.tasks.calculator import Calculator, result
from mesh.tasks.draw import is_held_out
from mesh.tasks.expression import MAX_CHARACTERS, evaluated
from mesh.tasks.guess import Guess
from mesh.tasks.response import Response, Score
from mesh.tasks.solution import Solution, solution_of
from mesh.tasks.stops import stop_strings
from mesh.types import Prompt, TurnText

Policy = Callable[[Sequence[TurnText]], str]
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def played(task: Any, prompt: Prompt, says: Policy) -> Response:
    """The conversation of a task with a policy, until the task ends it."""
    turns: list[TurnText] = []
    while True:
        text = says(turns)
        turns.append(TurnText(text, True, text, finish_reason="stop"))
        reply = task.reply(prompt, turns)
        if reply is None:
            return Response(text, turns=turns)
        shown = reply if isinstance(reply, str) else reply["content"]
        turns.append(TurnText(shown, False, shown))


def by_solution(task: Any, prompt: Prompt) -> tuple[Policy, Solution]:
    """A policy that says the solution, and that solution."""
    solution = solution_of(task, prompt)
    return lambda turns: solution.texts[sum(turn.sampled for turn in turns)], solution


def value_by_ast(node: ast.expr) -> int:
    """An expression's value as Python's own parser reads it."""
    if isinstance(node, ast.BinOp):
        combine = OPERATORS[type(node.op)]
        return combine(value_by_ast(node.left), value_by_ast(node.right))
    if isinstance(node, ast.UnaryOp):
        assert isinstance(node.op, ast.USub)
        return -value_by_ast(node.operand)
    assert isinstance(node, ast.Constant)
    return node.value


def some_expression(numbers: random.Random, depth: int = 3) -> str:
    kind = numbers.randrange(5) if depth else 0
    if kind == 0:
        return str(numbers.randrange(1000))
    inner = [some_expression(numbers, depth - 1) for _ in range(2)]
    if kind == 1:
        return f"-{inner[0]}"
    if kind == 2:
        return f"({inner[0]})"
    return f" {numbers.choice('+-*')} ".join(inner)


def test_expressions_have_the_values_that_python_gives_them():
    numbers = random.Random(3)
    texts = [some_expression(numbers) for _ in range(500)]
    short = [text for text in texts if len(text) <= MAX_CHARACTERS]
    assert len(short) > 400
    for text in short:
        assert evaluated(text) == value_by_ast(ast.parse(text.strip(), mode="eval").body), text


@pytest.mark.parametrize(
    "text",
    ["", " ", "1+", "+1", "(1", "1)", "()", "2**3", "4/2", "1//1", "1 2", "1e3", "1.5", "x", "٣",
     "__import__('os')", "1\n+1", "9" * (MAX_CHARACTERS + 1)],
)  # fmt: skip
def test_what_is_no_expression_has_no_value(text):
    with pytest.raises(ValueError):
        evaluated(text)


def test_the_deepest_expression_has_a_value():
    half = MAX_CHARACTERS // 2
    assert evaluated("(" * (half - 1) + "7" + ")" * (half - 1)) == 7
    assert evaluated("-" * (MAX_CHARACTERS - 1) + "7") == -7
    nines = "9" * (half - 1)
    assert evaluated(f"{nines}*{nines}") == int(nines) ** 2


@pytest.mark.parametrize(
    ("turn", "added"),
    [
        ("<calc>12*7</calc>", "=84;"),
        ("I see. <calc> 12 * 7 </calc>", "=84;"),
        ("<calc>1+1<calc>2*3</calc>", "=6;"),
        ("<calc>12/7</calc>", "=error;"),
        ("<calc></calc>", "=error;"),
        ("<calc>12*7", None),
        ("12*7</calc>", None),
        ("84", None),
    ],
)
def test_the_tool_answers_the_last_call_of_a_turn(turn, added):
    assert result(turn) == added


def calculator_score(*turns: tuple[str, bool], answer: str = "84") -> Score:
    told = [TurnText(text, sampled, text) for text, sampled in turns]
    prompt = Prompt(0, "12*7=", answer, info={"question": "12*7"})
    return Calculator(0).score(prompt, Response(turns[-1][0], turns=told))


CALL = ("<calc>12*7</calc>", True)


@pytest.mark.parametrize(
    ("turns", "reward", "used"),
    [
        ((CALL, ("=84;", False), ("84", True)), 1.0, 1.0),
        ((CALL, ("=84;", False), ("The answer is 84.", True)), 1.0, 1.0),
        ((CALL, ("=84;", False), ("85", True)), 0.0, 1.0),
        ((("84", True),), 1.0, 0.0),
        ((("12 times 7 is 84", True),), 1.0, 0.0),
        ((("84 or 85", True),), 0.0, 0.0),
        ((("8.4", True),), 0.0, 0.0),
        ((("184", True),), 0.0, 0.0),
        ((("-84", True),), 0.0, 0.0),
        ((("", True),), 0.0, 0.0),
        # the most turns: a call that nobody answers is no answer, though it ends with the number
        ((("<calc>84</calc>", True),), 0.0, 0.0),
        ((CALL, ("=84;", False), ("<calc>84</calc>", True)), 0.0, 1.0),
        # a tool that gave no value was of no use
        ((("<calc>12x7</calc>", True), ("=error;", False), ("84", True)), 1.0, 0.0),
    ],
)
def test_the_last_number_of_the_last_turn_is_the_answer(turns, reward, used):
    assert calculator_score(*turns) == Score(reward, {"used": used}, reward == 1.0)


def test_answers_may_have_commas_and_signs():
    assert calculator_score(("1,234,567", True), answer="1234567").reward == 1
    assert calculator_score(("It is -12.", True), answer="-12").reward == 1


@pytest.mark.parametrize("args", [{}, {"instruct": True}, {"operations": "-", "terms": 5}])
def test_the_calculator_s_solution_is_a_conversation_with_its_own_tool(args):
    task = load_task("calculator", 1, args)
    for prompt in task.train_prompts(0, 50):
        says, solution = by_solution(task, prompt)
        response = played(task, prompt, says)
        assert [turn.text for turn in response.turns if not turn.sampled] == list(solution.replies)
        assert task.score(prompt, response) == Score(1.0, {"used": 1.0}, True)
        assert stop_strings(task) == ("</calc>",) and solution.texts[0].endswith("</calc>")


def test_the_calculator_asks_what_its_settings_say():
    asked = [p.info["question"] for p in Calculator(0, digits=3, terms=3).train_prompts(0, 400)]
    parts = [question.replace("*", "+").split("+") for question in asked]
    assert {len(terms) for terms in parts} == {2, 3}
    assert {len(term) for terms in parts for term in terms} == {1, 2, 3}
    assert all(not term.startswith("0") for terms in parts for term in terms)
    assert {bool("*" in q) + 2 * bool("+" in q) for q in asked} == {1, 2}, "one operation each"
    one = [p.text for p in Calculator(0, digits=1, operations="-").train_prompts(0, 50)]
    assert all(len(text) == 4 and text[1::2] == "-=" for text in one)


def test_a_question_is_held_out_in_both_forms():
    plain, instructed = (Calculator(0, instruct=form) for form in (False, True))
    for task in (plain, instructed):
        held = {p.info["question"] for p in task.eval_prompts(100)}
        drawn = {p.info["question"] for step in range(20) for p in task.train_prompts(step, 64)}
        assert len(held) == 100 and not held & drawn
    assert all(is_held_out(p.text) for p in plain.eval_prompts(100))
    text = instructed.eval_prompts(1)[0].text
    question = plain.eval_prompts(1)[0].info["question"]
    assert text.startswith(f"What is {question}? Write <calc>{question}</calc>")


@pytest.mark.parametrize("chat", [False, True])
def test_halving_finds_every_number(chat):
    task = load_task("guess", 2, {"chat": chat})
    counts = []
    for prompt in task.train_prompts(0, 100):
        says, solution = by_solution(task, prompt)
        response = played(task, prompt, says)
        found = [t.text for t in response.turns if not t.sampled]
        told = [r if isinstance(r, str) else r["content"] for r in solution.replies]
        score = task.score(prompt, response)
        assert found == told and score.correct
        counts.append(score.parts["guesses"])
        assert score.reward == 1 - (counts[-1] - 1) / 14
    assert 1 < max(counts) <= 7, "99 numbers are halved 7 times"
    assert stop_strings(task) == (() if chat else ("?",))
    assert bool(prompt.messages) is chat and bool(prompt.text) is not chat


@pytest.mark.parametrize(
    ("guesses", "replies", "reward"),
    [
        (["40?"], [], 1.0),
        (["50?", "40?"], [" lower "], 0.75),
        (["7?", "8?", "40?"], [" higher ", " higher "], 0.5),
        (["7?", "8?", "9?"], [" higher ", " higher "], 0.0),
        (["40 or 41?", "none?", "040?"], [" guess one number ", " guess one number "], 0.5),
        (["40404040404040?", "40?"], [" guess one number "], 0.75),
    ],
)
def test_a_game_ends_when_the_number_is_found_or_the_guesses_are_used_up(guesses, replies, reward):
    task, prompt = Guess(0, guesses=3), Prompt(0, "1-99:", "40", info={"low": 1, "high": 99})
    response = played(task, prompt, lambda turns: guesses[len(turns) // 2])
    assert [turn.text for turn in response.turns[1::2]] == replies
    expected = Score(reward, {"guesses": float(len(guesses))}, reward > 0)
    assert task.score(prompt, response) == expected


def test_the_secret_is_a_function_of_seed_step_and_index():
    first, again, other = (Guess(seed).train_prompts(3, 64) for seed in (0, 0, 1))
    assert first == again and [p.answer for p in first] != [p.answer for p in other]
    for prompt in first:
        assert prompt.info["low"] <= int(prompt.answer) <= prompt.info["high"]
    held = Guess(0).eval_prompts(256)
    assert len({p.text for p in held}) == 256 and not {p.text for p in held} & {
        p.text for step in range(30) for p in Guess(0).train_prompts(step, 64)
    }


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("calculator", {"digits": 0}, "task_args.digits=0: must be 1 to 9"),
        ("calculator", {"terms": 1}, "task_args.terms=1: must be 2 to 5"),
        ("calculator", {"operations": "/"}, "task_args.operations='/': use some of"),
        ("guess", {"largest": 1}, "task_args.largest=1: must be at least 2"),
        ("guess", {"guesses": 0}, "task_args.guesses=0: must be at least 1"),
    ],
)
def test_settings_without_a_game_are_refused(name, args, said):
    with pytest.raises(ValueError, match=said):
        load_task(name, 0, args)
