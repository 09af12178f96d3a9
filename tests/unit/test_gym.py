"""`task=reasoning_gym`: every data set of the package by (seed, step, index), and its settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import reasoning_gym.factory

from mesh.config.text import Text
from mesh.tasks import Draw, draw_held_out, draw_prompts, load_task
from mesh.tasks.classes import scored_apart
from mesh.tasks.draw import is_held_out
from mesh.tasks.gym import OF_A_HASH, OF_DATA_SETS, extracted
from mesh.tasks.response import Response

SLOW = {"zebra_puzzles"}
"""A question takes a large part of a second."""

NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Scored, without an answer to teach."""

SUMS = {"name": "chain_sum", "min_terms": 2, "max_terms": 2}


def made(**args):
    return load_task("reasoning_gym", args.pop("seed", 0), {**SUMS, **args})


DRAWING = """
import json, sys
from mesh.tasks import load_task
from mesh.tasks.response import Response
drawn = {}
for name in json.loads(sys.argv[1]):
    task = load_task("reasoning_gym", 0, {"name": name})
    (prompt,) = task.train_prompts(3, 1)
    score = task.score(prompt, Response(prompt.answer)).reward if prompt.answer else None
    drawn[name] = [prompt.text, prompt.answer, score]
print(json.dumps(drawn))
"""


def test_every_data_set_is_drawn_and_scored_alike_in_two_pythons():
    """But for those that are refused."""
    refused = OF_A_HASH | {OF_DATA_SETS}
    assert refused < set(reasoning_gym.factory.DATASETS)
    names = sorted(set(reasoning_gym.factory.DATASETS) - refused - SLOW)
    assert len(names) > 90
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DRAWING, json.dumps(names)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    one, other = (json.loads(process.communicate()[0]) for process in started)
    assert set(one) == set(names)
    assert not [name for name in names if one[name] != other[name]]
    assert {name for name in names if one[name][2] is None} == NO_ANSWER
    scores = {name: score for name, (_, _, score) in one.items() if score is not None}
    assert {name: score for name, score in scores.items() if score < 0.99} == {}


def test_draws_are_a_function_of_seed_step_round_and_index():
    task = made()
    first = draw_prompts(task, Draw(2, 8))
    assert draw_prompts(made(), Draw(2, 12))[:8] == first
    texts = {p.text for p in first}
    for draw in (Draw(3, 8), Draw(2, 8, round=1)):
        assert len(texts & {p.text for p in draw_prompts(task, draw)}) < 4
    assert draw_prompts(made(seed=1), Draw(2, 8)) != first
    many = draw_prompts(task, Draw(0, 600))  # more than one data set of the package
    assert many[:10] == draw_prompts(task, Draw(0, 10)) and len({p.text for p in many}) > 500


def test_held_out_questions_are_never_trained_on_and_the_same_for_every_seed():
    task = made(max_digits=1)
    held = draw_held_out(task, 12)
    assert [p.text for p in held] == [p.text for p in draw_held_out(made(seed=5, max_digits=1), 12)]
    assert len({p.text for p in held}) == 12 and all(is_held_out(p.text) for p in held)
    drawn = {p.text for step in range(20) for p in draw_prompts(task, Draw(step, 64))}
    assert len(drawn) > 100 and not drawn & {p.text for p in held}
    with pytest.raises(ValueError, match="found only .. held-out questions of chain_sum"):
        draw_held_out(task, 256)


def test_settings_reach_the_package_and_stages_follow_in_one_run():
    task = load_task("reasoning_gym", 0, {
        **{Text(key): Text(str(value)) for key, value in SUMS.items()},
        "max_digits": Text("1"), "stages": {Text("5"): {Text("min_digits"): Text("3"),
                                                        Text("max_digits"): Text("3")}},
    })  # fmt: skip
    digits = [
        {len(n) for p in draw_prompts(task, Draw(step, 64)) for n in re.findall(r"\d+", p.text)}
        for step in (4, 5, 50)
    ]
    assert digits == [{1}, {3}, {3}]
    assert all(len(n) == 3 for p in draw_held_out(task, 9) for n in re.findall(r"\d+", p.text))


@pytest.mark.parametrize(
    "how, response, reward, parts",
    [
        ("all", " 12 ", 1.0, {}),
        ("tag", "<answer>1</answer> no <answer> 12 </answer>.", 1.0, {"format": 1.0}),
        ("tag", "12", 0.0, {"format": 0.0}),
        ("boxed", "$\\boxed{12}$", 1.0, {"format": 1.0}),
        ("number", "4 + 8 = 12.", 1.0, {"format": 1.0}),
        ("number", "twelve", 0.0, {"format": 0.0}),
    ],
)
def test_what_of_a_response_is_the_answer(how, response, reward, parts):
    task = made(extract=how, max_digits=1)
    prompt = next(p for p in draw_prompts(task, Draw(0, 512)) if p.answer == "12")
    score = task.score(prompt, Response(response))
    assert (score.reward, score.parts, score.correct) == (reward, parts, reward == 1.0)
    # another object, as a scoring process has it, makes the same item again
    assert made(extract=how, max_digits=1).score(prompt, Response(response)) == score


def test_an_item_that_is_made_anew_as_another_one_is_not_scored():
    prompt = draw_prompts(made(), Draw(0, 1))[0]
    other = replace(prompt, info={**prompt.info, "index": 7})
    with pytest.raises(ValueError, match="chain_sum made another question of the same seed"):
        made().score(other, Response("1"))


def test_partial_credit_is_a_reward_and_not_correct():
    prompt = draw_prompts(made(), Draw(0, 1))[0]
    score = made().score(prompt, Response(f"it is {prompt.answer}"))
    assert 0 < score.reward < 1 and score.correct is False
    assert extracted("-2.50", "number") == "-2.5" and extracted("1/2", "number") == "0.5"


def test_a_template_stands_around_the_question():
    (prompt,) = draw_prompts(made(template="{question} Think."), Draw(0, 1))
    assert prompt.text == prompt.info["question"] + " Think."


@pytest.mark.parametrize(
    "args, message",
    [
        ({"name": "chain_sums"}, "no such data set; did you mean chain_sum? it has ab, acre"),
        ({"name": "word_ladder"}, "depend on the order of a set, which is another in each process"),
        ({"name": "composite"}, "it is made of other data sets"),
        ({"max_term": 2}, "has no such key; did you mean task_args.max_terms?"),
        ({"size": 2}, "task_args.size=2: task=reasoning_gym has no such key"),
        ({"max_terms": Text("x")}, "task_args.max_terms=x: cannot be read as int"),
        ({"min_terms": 5}, "reasoning_gym refuses its settings: max_terms must be >= min_terms"),
        ({"stages": {3: {"digits": 2}}}, "task_args.stages.3.digits=2: chain_sum has no such"),
        ({"stages": {3: {"max_terms": 0}}}, "reasoning_gym refuses its settings"),
        ({"template": "hi"}, "it has no {question}"),
        ({"extract": "box"}, "task_args.extract='box'"),
    ],
)
def test_wrong_settings_are_refused(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made(**args)


def test_it_is_other_peoples_code_and_scored_apart():
    assert scored_apart("reasoning_gym", {})
    (prompt,) = load_task("reasoning_gym", 0, {"name": "boxnet"}).train_prompts(0, 1)
    with pytest.raises(ValueError, match="boxnet has no answers to teach"):
        load_task("reasoning_gym", 0, {"name": "boxnet"}).solution(prompt)
