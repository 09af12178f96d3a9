"""Scores with parts: what is refused, several functions as one, and functions added by a key."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
import user_tasks
from user_tasks import Parted

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.program.plan import task_spec
from mesh.tasks import TaskSpec
from mesh.tasks.calls import ScoringSettings, TaskSource
from mesh.tasks.judges import exact
from mesh.tasks.response import Response, Score
from mesh.tasks.returned import OUR_PARTS, Unusable, score_of
from mesh.tasks.scorer import Scorer, checked_task, num_workers, reward_problems
from mesh.tasks.spell_backward import SpellBackward
from mesh.tasks.weighted import WeightedScore, WithScores, with_scores
from mesh.types import Prompt, TurnText

PROMPT = Prompt(0, "abc>", "cba")


def test_a_score_becomes_plain_numbers_and_a_reward_alone_one_without_parts():
    parts = {"a": np.float32(0.5), "b.c-d_1": Decimal("0.1"), "c": torch.tensor([2]), "d": True}
    found = score_of(Score(np.float64(0.25), parts, np.bool_(False)))
    assert found == Score(0.25, {"a": 0.5, "b.c-d_1": 0.1, "c": 2.0, "d": 1.0}, False)
    assert {type(value) for value in found.parts.values()} == {float}
    assert list(found.parts) == list(parts) and found.correct is False
    assert score_of(np.float32(0.5)) == Score(0.5) and score_of(True) == Score(1.0)
    assert score_of(Score(1, correct=torch.tensor(True))).correct is True


@pytest.mark.parametrize(
    ("score", "wrong"),
    [
        (Score("x"), "returned 'x' of type str, which is no real number, as the reward of a Score"),
        (Score(0, {"a": float("nan")}), "returned nan of type float, which is not finite in "
                                        "float64, as the part a of a Score"),
        (Score(0, {"a": None}), "returned None of type NoneType, which is no real number, as the "
                                "part a of a Score"),
        (Score(0, [("a", 1)]), "returned [('a', 1)] of type list as the parts of a Score; give a "
                               "dict of numbers"),
        (Score(0, {"a b": 1}), "returned a Score of which a part is called 'a b'; a name has "
                               "letters, digits, _, - and . only"),
        (Score(0, {"": 1}), "returned a Score of which a part is called ''; a name has letters, "
                            "digits, _, - and . only"),
        (Score(0, {3: 1}), "returned a Score of which a part is called 3; a name has letters, "
                           "digits, _, - and . only"),
        (Score(0, {"mean": 1}), "returned a Score of which a part is called 'mean', but "
                                "reward/mean is a metric of ours; rename the part"),
        (Score(0, {}, 1), "returned 1 of type int, which is neither True, False nor None, as the "
                          "correct of a Score"),
        (Score(0, {}, "yes"), "returned 'yes' of type str, which is neither True, False nor None, "
                              "as the correct of a Score"),
        (Score(0, answer=5), "returned 5 of type int, which is no text, as the answer of a Score"),
    ],
)  # fmt: skip
def test_what_no_score_is_made_of_is_refused(score, wrong):
    with pytest.raises(Unusable) as caught:
        score_of(score)
    assert str(caught.value) == wrong


def test_every_metric_of_ours_below_reward_is_reserved():
    """The names that the code writes: a part could replace none of them."""
    assert set(OUR_PARTS) == {"mean", "std", "failed", "correct"}


def test_a_response_is_the_text_it_was_and_arrives_whole():
    one = Response("a<x>", "a", (1, 2, 9), "length")
    turns = [TurnText("a", True, "a", (1,), "stop"), TurnText("b", False), TurnText("c", True)]
    several = Response("c", turns=turns, finish_reason="turns")
    assert one == "a<x>" and one.startswith("a<") and f"{one}!" == "a<x>!" and type(one.text) is str
    assert one.turns == (TurnText("a<x>", True, "a", (1, 2, 9), "length"),)
    assert several.transcript == "abc" and several.text == "c"
    for response in (one, several, Response("")):
        back = pickle.loads(pickle.dumps(response))
        assert type(back) is Response and back == response and vars(back) == vars(response)
    long = "x" * 1000
    assert len(pickle.dumps(Response(long))) < 1200, "a text is sent once"


def right(answer: str, response: str, *, bonus: float = 0.0) -> Score:
    """As a judge."""
    correct = response.strip() == answer
    return Score(correct + bonus, {"format": float(response.isalpha())}, correct)


def says(answer: str, response: str) -> Score:
    return Score(0.0, answer=response.strip().upper())


def test_the_first_answer_that_a_function_finds_is_the_vote():
    both = WeightedScore({"right": (right, 1.0), "a": (says, 1.0), "b": (exact, 1.0)})
    assert both(PROMPT, Response(" cba")).answer == "CBA"
    assert WeightedScore({"right": (right, 1.0)})(PROMPT, Response("cba")).answer is None


def brevity(prompt: Prompt, response: Response) -> float:
    return max(0.0, 1 - len(response.tokens) / 8)


@dataclass(frozen=True)
class Both(SpellBackward):
    score = WeightedScore({"right": (partial(right, bonus=0.5), 2), "brief": (brevity, 0.1)})


def test_a_weighted_score_is_a_tasks_score():
    task = Both(0)
    assert task.score(PROMPT, Response("cba", tokens=(1, 2))) == Score(
        3.0 + 0.1 * 0.75, {"right": 1.5, "right.format": 1.0, "brief": 0.75}, True
    )
    assert task.score(PROMPT, Response("?", tokens=(1,) * 9)) == Score(
        1.0, {"right": 0.5, "right.format": 0.0, "brief": 0.0}, False
    )
    alone = WeightedScore({"brief": (brevity, 1.0)})
    assert alone(PROMPT, Response("x")) == Score(1.0, {"brief": 1.0}, None)
    large = {"a": (brevity, 1e17), "b": (brevity, 1.0), "c": (brevity, -1e17)}
    assert WeightedScore(large)(PROMPT, Response("")).reward == 1.0, "the sum is exactly rounded"


@pytest.mark.parametrize(
    ("functions", "wrong"),
    [
        ({}, "no function is given; give {NAME: (FUNCTION, WEIGHT)}"),
        ({"mean": (brevity, 1.0)}, "a part is called 'mean', but reward/mean is a metric of ours; "
                                   "rename the part"),
        ({"a": ("brevity", 1.0)}, "the function of a is 'brevity', which cannot be called"),
        ({"a": (brevity, float("inf"))}, "the weight of a is inf, which is no finite number"),
        ({"a": (brevity, "1")}, "the weight of a is '1', which is no finite number"),
    ],
)  # fmt: skip
def test_functions_that_cannot_be_weighed_are_refused(functions, wrong):
    with pytest.raises(ValueError) as caught:
        WeightedScore(functions)
    assert str(caught.value) == f"WeightedScore: {wrong}"


def scorer_of(spec: TaskSpec, workers: int) -> Scorer:
    task, _ = checked_task(spec, workers)
    return Scorer(TaskSource(task, spec, ScoringSettings(workers, 10.0, "stop")))


SCORES = {"user_tasks:num_letters": -0.25, "user_tasks:fails_over_z": 0.5}


@pytest.mark.parametrize("workers", [0, 1])
def test_functions_are_added_to_a_tasks_score_here_and_in_a_process(workers):
    spec = TaskSpec("spell_backward", 0, scores=SCORES)
    scorer = scorer_of(spec, workers)
    found = scorer.score([PROMPT] * 2, [Response("cba"), Response("ab")])
    assert found == [
        Score(1 - 0.75 + 0.5, {"task": 1.0, "num_letters": 3.0, "fails_over_z": 1.0}, True),
        Score(0 - 0.5 + 0.5, {"task": 0.0, "num_letters": 2.0, "fails_over_z": 1.0}, False),
    ]
    with pytest.raises(ValueError) as caught:
        scorer.score([PROMPT], [Response("z")])
    scorer.close()
    assert str(caught.value).splitlines()[:4] == [
        f"the score function of {SpellBackward(0)!r} returned None of type NoneType, which is no "
        "real number, by its function fails_over_z",
        "  prompt:   'abc>'",
        "  response: 'z'",
        "  answer:   'cba'",
    ]


def test_added_functions_leave_the_rest_of_a_task_alone():
    task = with_scores(Parted(0), SCORES)
    assert isinstance(task, WithScores) and task.seed == 0 and not hasattr(task, "reply")
    found = task.score(PROMPT, Response("cbx", tokens=(1, 2, 3)))
    own = Parted(0).score(PROMPT, Response("cbx", tokens=(1, 2, 3)))
    assert found.correct is own.correct is True and found.reward == own.reward - 0.75 + 0.5
    assert list(found.parts) == ["task", "share", "tokens", "first", "num_letters", "fails_over_z"]
    assert with_scores(task, {}) is task
    with pytest.raises(Unusable, match="has the part share, and so has a function of scores"):
        with_scores(Parted(0), {"user_tasks:share": 1.0}).score(PROMPT, Response("cba"))


def test_keys_name_functions_and_their_weights():
    words = ["conf=qwen3_tiny", "scores=[user_tasks:num_letters,user_tasks:share]"]
    conf = load_conf(words)[1]
    assert task_spec(conf).scores == {"user_tasks:num_letters": 1.0, "user_tasks:share": 1.0}
    assert num_workers(conf) == 1 and num_workers(Conf()) == 0
    weighed = load_conf([*words, "score_weights=[0.5,-2]"])[1]
    assert list(task_spec(weighed).scores.values()) == [0.5, -2.0]
    wrong = load_conf([*words, "score_weights=[0.5]"])[1]
    assert reward_problems(wrong) == [
        "score_weights=[0.5]: it has 1, and scores has 2; give one for each"
    ]
    twice = load_conf(["conf=qwen3_tiny", "scores=[a:b,a:b]"])[1]
    assert reward_problems(twice) == ["scores=[a:b, a:b]: names a function twice; name it once"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("brevity", "scores=brevity: write it as MODULE:NAME, e.g. my_scores:brevity"),
        ("user_tasks:brevity", "scores=user_tasks:brevity: user_tasks has no function brevity"),
        ("user_tasks:ORPHAN", "scores=user_tasks:ORPHAN: user_tasks has no function ORPHAN"),
        ("no_such:brevity", "scores=no_such:brevity: cannot import no_such (No module named "
                            "'no_such'); install it, or put its directory on PYTHONPATH"),
        ("user_tasks:task", "scores=user_tasks:task: another part is called task; rename the "
                            "function"),
    ],
)  # fmt: skip
def test_functions_that_are_not_there_are_refused_at_the_start(name, wrong, monkeypatch):
    monkeypatch.setattr(user_tasks, "task", brevity, raising=False)
    with pytest.raises(ValueError) as caught:
        checked_task(TaskSpec("spell_backward", 0, scores={name: 1.0}), workers=0)
    assert str(caught.value) == wrong
