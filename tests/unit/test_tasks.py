"""Tasks: prompts are functions of a counter, evaluation is disjoint, scorers cannot lie quietly."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.config.schema import Conf
from mesh.exactness.uneven import uneven_keys
from mesh.tasks import (
    Draw,
    Task,
    TaskSpec,
    TokenizerFiles,
    checked,
    draw_held_out,
    draw_prompts,
    load_task,
    numbered,
)
from mesh.tasks.calls import TaskSource
from mesh.tasks.draw import is_held_out, training_prompts
from mesh.tasks.replying import converses, seed_of, signature_problem
from mesh.tasks.response import Response
from mesh.tasks.scorer import Scorer, scoring_of
from mesh.tasks.stops import stop_strings
from mesh.tasks.told import tell_tokenizer
from mesh.text.tokenizer import CHARACTERS
from mesh.types import Prompt

NAMES = ("spell_backward", "arithmetic")


@dataclass(frozen=True)
class Counting:
    """A user's task whose scorer gives back whatever `reward` is; an exception is raised."""

    seed: int
    reward: Any = 1.0
    limit: int | None = None

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        return [Prompt(i, f"{step}.{i}?", str(i)) for i in range(num)]

    def eval_prompts(self, num: int) -> list[Prompt]:
        return [Prompt(i, f"e{i}?", str(i)) for i in range(num)]

    def solution(self, prompt: Prompt) -> str:
        return prompt.answer

    def score(self, prompt: Prompt, response: str) -> float:
        if isinstance(self.reward, Exception):
            raise self.reward
        return self.reward


@dataclass(frozen=True)
class Unmakeable(Counting):
    """A user's task whose constructor raises what is no message of ours."""

    def __post_init__(self) -> None:
        raise KeyError("nowhere")


@dataclass(frozen=True)
class Refilling(Counting):
    """A user's task that can refill a step. offset: of its ids in later rounds."""

    offset: int = 0

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        first = self.offset * (round > 0)
        return [Prompt(i, f"{step}.{round}.{i}?", str(i)) for i in range(first, first + num)]


@dataclass(frozen=True)
class Failing(Refilling):
    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        raise TypeError("no such question")


@dataclass(frozen=True)
class Incomplete:
    limit: int

    def score(self, prompt: Prompt, response: str) -> float:
        return 0.0


@pytest.mark.parametrize("answer", [5, 0.5, None, b"5", ["5"]], ids=repr)
def test_an_answer_that_is_no_text_is_refused(answer):
    """A task that compares it with a response finds none right."""
    with pytest.raises(ValueError) as caught:
        checked([Prompt(0, "", ""), Prompt(1, "2+3=", answer)], 2, "train_prompts")
    assert str(caught.value) == (
        f"the task's train_prompts was asked for 2 prompts and gave answer={answer!r} at index 1, "
        f"which is {type(answer).__name__}: no response, which is text, equals it; write str(...), "
        'or "" for none, and keep what else score needs in a subclass of Prompt'
    )


@pytest.mark.parametrize(
    "text", [["abc"], ("abc", "d"), b"abc", None, [{"role": "user"}]], ids=repr
)
def test_a_text_that_is_no_text_is_refused(text):
    with pytest.raises(ValueError, match="at index 0; return a Prompt with a text"):
        checked([Prompt(0, text, "")], 1, "train_prompts")


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**6), num=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_train_prompts_depend_on_seed_step_and_index_alone(name, seed, step, num):
    prompts = load_task(name, seed, {}).train_prompts(step, num)
    longer = load_task(name, seed, {}).train_prompts(step, num + 5)
    assert prompts == longer[:num]
    assert [prompt.prompt_id for prompt in longer] == list(range(num + 5))


def test_train_prompts_are_pinned():
    # a change here changes every run that anybody has recorded
    texts = [prompt.text for prompt in load_task("spell_backward", 0, {}).train_prompts(3, 4)]
    assert texts == ["lfhfr>", "npbh>", "bvt>", "txaq>"]
    texts = [prompt.text for prompt in load_task("arithmetic", 0, {}).train_prompts(3, 4)]
    assert texts == ["98+47=", "61+75=", "74-86=", "52+13="]


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_seeds_differ(name):
    draws = [
        tuple(prompt.text for prompt in load_task(name, seed, {}).train_prompts(step, 8))
        for seed in range(4)
        for step in range(50)
    ]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize(
    ("name", "args", "num_eval"),
    [
        ("spell_backward", {}, 256),
        ("spell_backward", {"max_length": 3}, 1000),
        ("spell_backward", {"min_length": 1, "max_length": 2}, 60),
        ("arithmetic", {}, 1000),
        ("arithmetic", {"digits": 1, "operations": "+"}, 5),
    ],
)
def test_evaluation_is_distinct_and_disjoint_from_training(name, args, num_eval):
    held_out = [prompt.text for prompt in load_task(name, 7, args).eval_prompts(num_eval)]
    assert len(set(held_out)) == num_eval
    for seed in (7, 8):
        task = load_task(name, seed, args)
        trained = {prompt.text for step in range(100) for prompt in task.train_prompts(step, 64)}
        assert not trained & set(held_out)


@pytest.mark.parametrize("name", NAMES)
def test_eval_prompts_are_the_same_for_every_seed_and_a_prefix_of_more(name):
    more = load_task(name, 1, {}).eval_prompts(50)
    assert load_task(name, 2, {}).eval_prompts(20) == more[:20]
    assert [prompt.prompt_id for prompt in more] == list(range(50))


def test_one_question_in_eight_is_held_out():
    share = sum(is_held_out(f"{number}?") for number in range(20_000)) / 20_000
    assert abs(share - 1 / 8) < 0.01


@pytest.mark.parametrize("field", ["text", "answer"])
def test_held_out_prompts_that_are_others_when_asked_again_are_refused(monkeypatch, field):
    """As those of random numbers without a seed; both are shown."""
    calls = iter("ab")

    def eval_prompts(self, num):
        call = next(calls)
        last = {"text": "2", "answer": ""} | {field: call}
        return [Prompt(0, "1", ""), Prompt(1, **last)]

    monkeypatch.setattr(Counting, "eval_prompts", eval_prompts)
    with pytest.raises(ValueError, match="and, asked again, ") as caught:
        draw_held_out(Counting(0), 2)
    assert "at index 1" in str(caught.value)
    assert str(caught.value).count("'a'") == str(caught.value).count("'b'") == 1


def test_too_few_held_out_questions_is_an_error():
    with pytest.raises(ValueError, match=r"eval\.num_prompts=30: found only \d+ held-out"):
        load_task("spell_backward", 0, {"min_length": 1, "max_length": 1}).eval_prompts(30)


def test_a_small_task_still_has_training_questions():
    task = load_task("spell_backward", 0, {"min_length": 1, "max_length": 1})
    assert len({prompt.text for prompt in task.train_prompts(0, 500)}) > 15


def test_a_task_whose_every_question_is_held_out_is_refused():
    text = next(f"{number}?" for number in range(1000) if is_held_out(f"{number}?"))
    with pytest.raises(ValueError, match=r"task_args: .* no question to train on.*widen the task"):
        training_prompts(lambda prompt_id, _: Prompt(prompt_id, text, ""), 0, 0, 1)


def score_all(task: Task, prompts: list[Prompt], responses: list[str]) -> list[float]:
    """The rewards as a rank gets them that scores in its own process."""
    unused = TaskSpec("spell_backward", 0)  # a process that scores would make its own from it
    scorer = Scorer(TaskSource(task, unused, scoring_of(Conf())))
    return [score.reward for score in scorer.score(prompts, [*map(Response, responses)])]


def prompts_with(*ids: int) -> list[Prompt]:
    return [Prompt(i, f"{i}?", "") for i in ids]


@pytest.mark.parametrize("ids", [(0, 1, 2), (7, -3, 2**70), (np.int64(5), 6, 7)], ids=str)
def test_ids_may_be_any_integers_and_places_count_from_0(ids):
    prompts = prompts_with(*ids)
    assert checked(prompts, 3, "train_prompts") == prompts
    assert [(p.prompt_id, p.prompt) for p in numbered(prompts)] == list(enumerate(prompts))
    assert [p.prompt_id for p in numbered(prompts, first_id=5)] == [5, 6, 7]


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        ((0, 1), "2; return 3"),
        ((), "0; return 3"),
        (range(9), "9; return 3"),
        ((4, 9, 4), "prompt_id=4 twice, at index 0 and 2; give each prompt of a call an id of its "
                    "own"),
        ((4, np.int64(4), 1), "prompt_id=4 twice, at index 0 and 1; give each prompt of a call an "
                              "id of its own"),
        ((4, "5", 6), "prompt_id='5' at index 1; an id is any integer"),
        ((4, 5, 6.0), "prompt_id=6.0 at index 2; an id is any integer"),
        ((True, 5, 6), "prompt_id=True at index 0; an id is any integer"),
    ],
)  # fmt: skip
def test_prompts_that_are_too_few_or_share_an_id_are_refused(ids, got):
    with pytest.raises(ValueError) as caught:
        checked(prompts_with(*ids), 3, "train_prompts")
    assert str(caught.value) == f"the task's train_prompts was asked for 3 prompts and gave {got}"


@pytest.mark.parametrize("wrong", [("abc>", "cba"), Prompt(1, 7, "")], ids=repr)  # type: ignore[arg-type]
def test_what_is_no_prompt_with_a_text_is_refused(wrong):
    with pytest.raises(ValueError, match="gave .* at index 1; return a Prompt with a text"):
        checked([Prompt(0, "", ""), wrong], 2, "eval_prompts")


@pytest.mark.parametrize("name", NAMES)
def test_a_first_round_is_the_step_s_prompts_and_later_ones_are_others(name):
    task = load_task(name, 3, {})
    assert draw_prompts(task, Draw(5, 8)) == task.train_prompts(5, 8)
    draws = [Draw(5, 8), Draw(5, 4, 1), Draw(5, 6, 2)]
    rounds = [draw_prompts(task, draw) for draw in draws]
    assert rounds == [draw_prompts(load_task(name, 3, {}), draw) for draw in draws]
    texts = [tuple(prompt.text for prompt in prompts)[:4] for prompts in rounds]
    assert len(set(texts)) == 3
    more = draw_prompts(task, Draw(5, 6, 1))
    assert more[:4] == rounds[1], "a prompt is a function of its round and index alone"


def test_a_task_without_rounds_draws_the_first_and_says_why_it_cannot_draw_more():
    task = Counting(seed=0)
    assert draw_prompts(task, Draw(2, 3)) == task.train_prompts(2, 3)
    with pytest.raises(ValueError) as caught:
        draw_prompts(task, Draw(2, 3, round=1))
    assert str(caught.value) == (
        "the task's train_prompts takes no round, so it cannot draw more prompts for step 2; give "
        "it a parameter `round: int = 0`, and let each round draw other prompts"
    )


def test_a_later_round_is_the_task_s_and_what_it_raises_too():
    prompts = draw_prompts(Refilling(seed=0, offset=1), Draw(2, 3, round=2))
    assert [(p.prompt_id, p.text) for p in prompts] == [(i, f"2.2.{i}?") for i in (1, 2, 3)]
    with pytest.raises(ValueError, match="train_prompts of Failing.* raised TypeError: no such "):
        draw_prompts(Failing(seed=0), Draw(2, 3, round=1))


@pytest.mark.parametrize("name", ["spell_backward", f"{__name__}:Counting"])
def test_uneven_rewards_are_a_wrapper_of_a_task(name):
    """Its prompts and solutions; rewards differ by the response, by less than one answer."""
    keys = uneven_keys(name, {}, workers=0)
    wrapper = load_task(keys["task"], 3, keys["task_args"])
    inner = load_task(name, 3, {})
    assert draw_prompts(wrapper, Draw(1, 4)) == draw_prompts(inner, Draw(1, 4))
    assert wrapper.eval_prompts(4) == inner.eval_prompts(4)
    (prompt,) = wrapper.train_prompts(0, 1)
    assert wrapper.solution(prompt) == inner.solution(prompt)
    responses = [Response(text) for text in (inner.solution(prompt), "a", "b", "")]
    more = [wrapper.score(prompt, r) - inner.score(prompt, r) for r in responses]
    assert all(0 <= x < 0.25 for x in more) and len(set(more)) == 4
    assert more == [wrapper.score(prompt, r) - inner.score(prompt, r) for r in responses]
    if name in NAMES:
        assert draw_prompts(wrapper, Draw(1, 4, 1)) == draw_prompts(inner, Draw(1, 4, 1))
    else:
        with pytest.raises(ValueError, match="takes no round"):
            draw_prompts(wrapper, Draw(1, 4, 1))


def test_uneven_rewards_have_what_a_task_may_have():
    """Replies, stop strings and the tokenizer decide what is generated."""
    keys = uneven_keys("calculator", {}, workers=0)
    wrapper = load_task(keys["task"], 3, keys["task_args"])
    assert converses(wrapper) and not signature_problem(wrapper)
    assert stop_strings(wrapper) == ("</calc>",) and seed_of(wrapper, 1) == {}
    keys = uneven_keys("user_tasks:Told", {}, workers=0)
    told = load_task(keys["task"], 3, keys["task_args"])
    tell_tokenizer(told, TokenizerFiles(CHARACTERS))
    assert told.train_prompts(0, 1)[0].text == "98>"
    assert not converses(told) and stop_strings(told) == () and not hasattr(told, "all_prompts")


def test_spell_backward_asks_for_the_reversed_word():
    prompts = load_task("spell_backward", 0, {}).train_prompts(0, 600)
    assert all(re.fullmatch(r"[a-z]{3,5}>", prompt.text) for prompt in prompts)
    assert all(prompt.answer == prompt.text[-2::-1] for prompt in prompts)
    lengths = [len(prompt.answer) for prompt in prompts]
    assert all(150 < lengths.count(length) < 250 for length in (3, 4, 5))


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_arithmetic_asks_for_the_right_result(digits):
    prompts = load_task("arithmetic", 0, {"digits": digits}).train_prompts(0, 300)
    for prompt in prompts:
        assert re.fullmatch(rf"\d{{{digits}}}[+-]\d{{{digits}}}=", prompt.text)
        assert digits == 1 or not re.search(r"(^|[+-])0", prompt.text)
        assert int(prompt.answer) == eval(prompt.text[:-1])
    assert {prompt.text[digits] for prompt in prompts} == {"+", "-"}


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_scores_one_and_nothing_else_does(name):
    task = load_task(name, 0, {})
    prompt = task.train_prompts(0, 1)[0]
    right = task.solution(prompt)
    responses = [right, f" {right}\n", right + "a", right[:-1], "", f"{right} {right}"]
    assert score_all(task, [prompt] * 6, responses) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


NOT_FINITE, NO_NUMBER = "which is not finite in float64", "which is no real number"


@pytest.mark.parametrize(
    ("reward", "shown"),
    [
        (math.nan, f"returned nan of type float, {NOT_FINITE}"),
        (-math.inf, f"returned -inf of type float, {NOT_FINITE}"),
        (np.float32("inf"), f"returned np.float32(inf) of type numpy.float32, {NOT_FINITE}"),
        (Decimal("NaN"), f"returned Decimal('NaN') of type decimal.Decimal, {NOT_FINITE}"),
        (None, f"returned None of type NoneType, {NO_NUMBER}"),
        ("1.0", f"returned '1.0' of type str, {NO_NUMBER}"),
        (np.str_("1.0"), f"returned np.str_('1.0') of type numpy.str_, {NO_NUMBER}"),
        ("x" * 999, f"returned '{'x' * 299}... of type str, {NO_NUMBER}"),
        (1j, f"returned 1j of type complex, {NO_NUMBER}"),
        (np.complex64(1), f"returned np.complex64(1+0j) of type numpy.complex64, {NO_NUMBER}"),
        (torch.tensor(1j), f"returned tensor(0.+1.j) of type torch.Tensor, {NO_NUMBER}"),
        ([0.5], f"returned [0.5] of type list, {NO_NUMBER}"),
        (np.array([1, 2]), "numpy.ndarray, which has 2 elements instead of one"),
        (torch.ones(2, 2), "torch.Tensor, which has 4 elements instead of one"),
        (torch.ones(0), "torch.Tensor, which has 0 elements instead of one"),
        (2**53 + 1, "an integer that float64 rounds to 9007199254740992"),
        (-(10**400), "beyond the largest reward, 1e+100"),
        (1e308, "returned 1e+308 of type float, beyond the largest reward, 1e+100"),
    ],
)
def test_what_is_no_reward_stops_with_the_case_and_says_why(reward, shown):
    task = Counting(seed=0, reward=reward)
    with pytest.raises(ValueError) as caught:
        score_all(task, [Prompt(0, "How\nmany?", "three")], ["thr\tee"])
    message = str(caught.value)
    assert all(part in message for part in ("Counting", r"'How\nmany?'", r"'thr\tee'", "'three'"))
    assert f"{shown}\n  prompt:" in message
    assert "make it return one finite number (bool, int, float, Decimal" in message


@pytest.mark.parametrize(
    ("reward", "value"),
    [
        (True, 1.0),
        (np.bool_(True), 1.0),
        (np.uint8(200), 200.0),
        (np.float32(0.1), 0.10000000149011612),
        (np.array(2), 2.0),
        (np.array([[0.1]]), 0.1),
        (torch.tensor(False), 0.0),
        (torch.tensor([1.5], dtype=torch.bfloat16), 1.5),
        (torch.tensor(0.1, dtype=torch.float64, requires_grad=True), 0.1),
        (Decimal("0.1"), 0.1),
        (Fraction(1, 3), 1 / 3),
        (16777217, 16777217.0),
        (-(2**53), -9007199254740992.0),
        (1e39, 1e39),
        (5e-324, 5e-324),
    ],
)
def test_any_real_scalar_is_a_reward_in_float64(reward, value):
    (found,) = score_all(Counting(seed=0, reward=reward), [Prompt(0, "q", "a")], ["r"])
    assert found == value and type(found) is float


def test_a_scorer_that_raises_stops_with_the_case_and_its_cause():
    cause = KeyError("lost")
    with pytest.raises(ValueError, match=r"raised KeyError: 'lost'\n.*'q'\n.*'r'\n.*'a'") as caught:
        score_all(Counting(seed=0, reward=cause), [Prompt(0, "q", "a")], ["r"])
    assert caught.value.__cause__ is cause


def test_prompts_and_responses_must_pair_up():
    with pytest.raises(AssertionError, match="1 prompts, 2 responses"):
        score_all(Counting(seed=0), [Prompt(0, "q", "a")], ["r", "s"])


def test_a_task_of_the_users_own_loads_by_module_and_class():
    task = load_task(f"{__name__}:Counting", 5, {"limit": None, "reward": 0.5})
    assert dataclasses.asdict(task) == {"seed": 5, "reward": 0.5, "limit": None}


@pytest.mark.parametrize("code", ["1 +", "x = undefined"])
def test_a_module_that_cannot_be_imported_says_where(tmp_path, monkeypatch, code):
    (tmp_path / "broken_module.py").write_text(f"import math\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"^task=broken_module:Task: importing broken_module "
    ) as e:
        load_task("broken_module:Task", 0, {})
    assert "broken_module.py, line 2); correct it there" in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "args", "parts"),
    [
        ("spell_backwards", {}, ["task=spell_backwards", "did you mean spell_backward?"]),
        ("arith", {}, ["task=arith", "did you mean arithmetic?", "MODULE:CLASS"]),
        ("", {}, ["task=", "spell_backward, arithmetic"]),
        (":Chess", {}, ["task=:Chess", "MODULE:CLASS"]),
        ("no_such_module_here:Chess", {}, ["cannot import no_such_module_here", "PYTHONPATH"]),
        (f"{__name__}:Countin", {}, ["has no Countin", "did you mean Counting?"]),
        (f"{__name__}:NAMES", {}, ["@dataclass"]),
        (
            f"{__name__}:Unmakeable",
            {},
            ["making it raised KeyError: 'nowhere' (", "test_tasks.py, line ", "correct it there"],
        ),
        (f"{__name__}:Incomplete", {}, ["method train_prompts", "method solution", "seed: int"]),
        (
            "spell_backward",
            {"max_lenght": 4, "min_length": "3"},
            [
                "task_args.max_lenght=4: task=spell_backward has no such key",
                "did you mean task_args.max_length? it has min_length, max_length",
                "task_args.min_length='3': expected int, got str",
            ],
        ),
        ("spell_backward", {"seed": 4}, ["task_args.seed=4", "no such key"]),
        (
            "spell_backward",
            {"min_length": True},
            ["task_args.min_length=True: expected int, got bool"],
        ),
        (
            "spell_backward",
            {"min_length": 3.5},
            ["task_args.min_length=3.5: expected int, got float"],
        ),
        ("spell_backward", {"min_length": 0}, ["task_args.min_length=0: must be"]),
        ("spell_backward", {"min_length": 6}, ["task_args.max_length=5", "task_args.min_length=6"]),
        ("arithmetic", {"digits": 0}, ["task_args.digits=0: must be"]),
        ("arithmetic", {"operations": "+*"}, ["task_args.operations='+*': use '+'"]),
        ("arithmetic", {"operations": ""}, ["task_args.operations=''"]),
        (f"{__name__}:Counting", {"limit": "x"}, ["task_args.limit='x'", "expected int | None"]),
    ],
)
def test_bad_task_settings_name_key_value_and_remedy(name, args, parts):
    with pytest.raises(ValueError) as caught:
        load_task(name, 0, args)
    assert [part for part in parts if part not in str(caught.value)] == []
