"""Metrics of an evaluation by hand, what counts as correct, and the metric of a best model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from user_tasks import Short

from mesh.checkpoint.best import best_metric_problems
from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.lifecycle.process import Process
from mesh.program.assembly import assemble, check, sync
from mesh.program.plan import Plan
from mesh.recipes import grpo
from mesh.roles.answers import (
    GREEDY,
    Values,
    answer_of,
    means,
    metric_names,
    values_of,
    voted,
)
from mesh.tasks import draw_held_out
from mesh.tasks.correct import is_correct
from mesh.tasks.response import Score
from mesh.tasks.spell_backward import SpellBackward
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import Prompt, Rollout


def generating(process: Process, *words: str, held_out: bool = True) -> Plan:
    """A start on 3 ranks of a program that does not train."""
    conf = load_conf(["conf=qwen3_tiny", *words])[1]
    return check(conf, replace(process, world_size=3), training=False, held_out=held_out)


def rollout(prompt_id: int, sample_id: int, reward: float, *tokens: int) -> Rollout:
    """tokens: of the response; none: one that names the reward."""
    said = tokens or (2 + int(10 * reward),)
    return Rollout(prompt_id, sample_id, (1,), said, (-0.5,) * len(said), reward, "stop")


@dataclass(frozen=True)
class FromHalf(SpellBackward):
    """A task that says what is correct."""

    answer: Any = None

    def is_correct(self, reward: float) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return reward >= 0.5 if self.answer is None else self.answer


REWARDS = {0: (0.9, 0.0, 0.2), 1: (0.7 + 0.2 + 0.1, 0.5, 0.9), 2: (1.0, 1.5, 1 - 1e-7)}
"""Of prompts: those of two samples, and the greedy one; 0.7 + 0.2 + 0.1 is less than 1."""


def values_by_hand(task: Any) -> Values:
    tokenizer = load_tokenizer(CHARACTERS)
    sampled = [rollout(p, g, REWARDS[p][g]) for p in REWARDS for g in range(2)]
    greedy = [rollout(p, GREEDY, REWARDS[p][2]) for p in REWARDS]
    answers = [answer_of(task, tokenizer, r) for r in (*sampled, *greedy)]
    return values_of([[a for a in answers if a.prompt_id == p] for p in REWARDS], ks=[1, 2])


def test_metrics_by_hand():
    """0, 1 and 2 samples of 2 are correct, and the last greedy answer; where 0.5 is enough, 1, 2
    and 2, and two greedy ones. Partial credit counts in the mean reward alone. No two responses
    are the same, so each vote is a tie."""
    expected = {
        SpellBackward(0): [1 / 2, 1 / 2, 2 / 3, 1 / 2, 1 / 3],
        FromHalf(0): [5 / 6, 5 / 6, 1.0, 5 / 6, 2 / 3],
    }
    names = ["accuracy", "pass@1", "pass@2", "majority@2", "accuracy_greedy"]
    for task, shares in expected.items():
        found = means(values_by_hand(task), "eval/hard")
        wanted = dict(zip(names, shares, strict=True)) | {
            "reward": (0.9 + 1.0 + 0.5 + 1.0 + 1.5) / 6,
            "response_length/mean": 1.0,
            "response/truncated": 0.0,
        }
        assert found == {f"eval/hard/{k}": pytest.approx(v, abs=1e-15) for k, v in wanted.items()}
        assert list(found) == metric_names([1, 2], True, "eval/hard")


def test_what_is_voted_on():
    """The answer that the score found, else the stripped text of the response; an empty answer has
    no vote, an empty response has one."""
    tokenizer, task = load_tokenizer(CHARACTERS), SpellBackward(0)
    a, space = tokenizer.encode("a")[0], tokenizer.encode(" ")[0]
    one, spaced = rollout(0, 0, 0.0, a), rollout(0, 1, 0.0, space, a, space)
    votes = [answer_of(task, tokenizer, r).vote for r in (one, spaced)]
    assert votes[0] == votes[1] and [voted(tokenizer, r) for r in (one, spaced)] == ["a", "a"]
    assert answer_of(task, tokenizer, replace(one, answer="7")).vote not in (votes[0], None)
    assert answer_of(task, tokenizer, replace(one, answer="")).vote is None
    assert answer_of(task, tokenizer, rollout(0, 0, 0.0, space)).vote not in (votes[0], None)


@pytest.mark.parametrize(
    ("reward", "correct"),
    [
        (1.0, True),
        (7.0, True),
        (0.7 + 0.2 + 0.1, True),
        (float(np.float32(0.7) + np.float32(0.2) + np.float32(0.1)), True),
        (1 - 1e-6, True),
        (1 - 2e-6, False),
        (0.9, False),
        (-1.0, False),
    ],
)
def test_correct_is_a_reward_of_one_up_to_rounding(reward, correct):
    assert is_correct(SpellBackward(0), reward) is correct


@pytest.mark.parametrize("answer", [None, 1, "yes", 0.0])
def test_what_a_task_calls_correct_is_a_bool(answer):
    assert is_correct(FromHalf(0, answer=np.bool_(True)), 0.0) is True
    if answer is None:
        assert [is_correct(FromHalf(0), reward) for reward in (0.4, 0.5)] == [False, True]
        answer = KeyError("lost")
    said = "raised KeyError" if isinstance(answer, KeyError) else f"returned {answer!r}; return T"
    with pytest.raises(ValueError, match=rf"^is_correct\(0.3\) of FromHalf\(.*\) {said}"):
        is_correct(FromHalf(0, answer=answer), 0.3)


def test_a_task_that_cannot_say_what_is_correct_is_refused_at_the_start(process):
    name = f"task={__name__}:FromHalf"
    with pytest.raises(
        ValueError, match=r"- is_correct\(1.0\) of FromHalf\(.*returned 'maybe'; re"
    ):
        generating(process, name, "task_args.answer=maybe", "reward.workers=0")
    assert generating(process, name, "reward.workers=0").task == FromHalf(0)


def evaluated(process: Process, capsys, *words: str) -> tuple[str, dict[str, float]]:
    """What two evaluations print, and the metrics of one."""
    sizes = ["eval.num_prompts=4", "eval.num_samples=2", "reward.workers=0"]
    conf = load_conf(["conf=qwen3_tiny", *sizes, *words])[1]
    program = assemble(check(conf, process, training=False), process)
    sync(program)
    capsys.readouterr()
    grpo.held_out(program, process)
    metrics = grpo.held_out(program, process).metrics
    return capsys.readouterr().out, metrics


@dataclass(frozen=True)
class Partial(SpellBackward):
    """The share of right characters, of at most `most`."""

    most: float = 0.9

    def score(self, prompt: Prompt, response: str) -> float:
        pairs = zip(prompt.answer, response, strict=False)
        return self.most * sum(a == b for a, b in pairs) / len(prompt.answer)


@dataclass(frozen=True)
class PartialCorrect(Partial):
    def is_correct(self, reward: float) -> bool:
        return reward >= self.most


@dataclass(frozen=True)
class PartialNever(Partial):
    def score(self, prompt: Prompt, response: str) -> Any:
        return Score(super().score(prompt, response), {"letters": len(response)}, correct=False)


def test_scores_that_say_that_nothing_is_correct_are_believed(process, capsys):
    said, metrics = evaluated(process, capsys, f"task={__name__}:PartialNever")
    assert said == "" and metrics["eval/accuracy"] == 0 and metrics["eval/reward"] > 0.1
    assert 2 < metrics["eval/reward/letters"] < 6


def test_rewards_that_differ_and_none_correct_are_warned_of_once(process, capsys):
    said, metrics = evaluated(process, capsys, f"task={__name__}:Partial")
    assert said.count("warning") == 1 and said.startswith(
        "warning: eval: no response was correct, though rewards differ, up to 0.9: a response is "
        "correct where its reward is at least 0.999999; if less is right, give the task a method "
        "is_correct(reward) -> bool, or return Score(reward, correct=...). "
    )
    assert [metrics[f"eval/{name}"] for name in ("accuracy", "pass@2", "accuracy_greedy")] == [
        0
    ] * 3
    assert 0.1 < metrics["eval/reward"] < 0.9
    said, other = evaluated(process, capsys, f"task={__name__}:PartialCorrect")
    assert said == "" and other["eval/reward"] == metrics["eval/reward"]
    assert other["eval/accuracy_greedy"] > 0


MORE_SETS = ["eval.sets.hard.num_samples=2", "eval.sets.cold.temperature=0"]


@pytest.mark.parametrize(
    ("metric", "line"),
    [
        (
            "eval/rewards",
            "logs it; did you mean eval/reward? use one of eval/accuracy, eval/pass@1, eval/pass@4",
        ),
        ("accuracy", "logs it, and a step's own metrics are of the weights before its update; did"),
        ("eval/pass@8", "logs it; did you mean eval/pass@4? use one of eval/accuracy, eval/pass@1"),
        ("-eval/reward/", "logs it; did you mean eval/reward? use one of eval/accuracy, "),
        ("loss", "logs it, and a step's own metrics are of the weights before its update; use one"),
        ("eval/hard/pass@4", "logs it; did you mean eval/hard/pass@2? use one of eval/accuracy, "),
        ("eval/cold/accuracy_greedy", "logs it; did you mean eval/"),
        ("eval/failed", "logs it; did you mean eval/"),
    ],
)
def test_the_best_model_follows_a_metric_of_the_evaluations(metric, line):
    (refused,) = best_metric_problems(following(metric))
    assert refused.startswith(f"checkpoint.best_metric={metric}: no evaluation of the run {line}")
    assert refused.endswith(", or eval/reward/PART of a score with parts")


@pytest.mark.parametrize(
    "metric",
    [
        *metric_names([1, 4], True), *metric_names([1, 2], True, "eval/hard"),
        *metric_names([1], False, "eval/cold"), "-eval/response_length/mean", "eval/reward/format",
        "-eval/cold/reward/steps",
    ],
)  # fmt: skip
def test_every_metric_of_every_set_can_be_followed(metric):
    assert best_metric_problems(following(metric)) == []


def test_failed_scores_can_be_followed_where_they_are_counted():
    assert best_metric_problems(following("-eval/failed", "reward.on_failure=zero")) == []


def following(metric: str, *words: str) -> Conf:
    return load_conf(["conf=qwen3_tiny", f"checkpoint.best_metric={metric}", *MORE_SETS, *words])[1]


def test_a_start_refuses_a_metric_that_is_none(process):
    with pytest.raises(ValueError, match="- checkpoint.best_metric=loss: no evaluation of the run"):
        check(following("loss"), replace(process, world_size=2))


def test_held_out_prompts_are_those_of_the_task_and_as_many_as_asked():
    assert draw_held_out(SpellBackward(0), 5) == SpellBackward(0).eval_prompts(5)
    with pytest.raises(ValueError, match="eval_prompts was asked for 5 prompts and gave 4"):
        draw_held_out(Short(0), 5)


def test_what_only_training_asks_does_not_keep_a_program_from_generating(process):
    long = ["task_args.min_length=30", "task_args.max_length=30"]
    words = ["num_prompts=64", "trainer.microbatch_tokens=1", "task=user_tasks:ShortTraining"]
    plan = generating(process, *words)
    assert plan.trainer.optimizer is None and not plan.trainer.frozen
    generating(process, *long, "task=user_tasks:Short", held_out=False)
    with pytest.raises(ValueError, match=r"the prompt '[a-z]{30}>' has 31 tokens"):
        generating(process, *long)
    with pytest.raises(ValueError, match="eval_prompts was asked for 256 prompts and gave 255"):
        generating(process, "task=user_tasks:Short")
    with pytest.raises(ValueError, match="trainer.tp=3"):
        generating(process, "trainer.tp=3")
