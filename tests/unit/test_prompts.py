"""The prompts of a step on one rank: those that cannot be used, what replaces them, and messages.

Ranks that disagree: distributed/test_agreement.py. Whole runs: faults/test_prompt_runs.py.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

import pytest
from user_tasks import Keyed, LongLater

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.lifecycle.agreement import text_of
from mesh.lifecycle.process import Process
from mesh.program.assembly import check
from mesh.program.prompt_checks import training_problems
from mesh.runs.progress import Pace, columns
from mesh.runs.warnings import StepWarnings
from mesh.tasks import Draw, Task, TaskSpec, draw_held_out
from mesh.tasks.held_out import HeldOut
from mesh.tasks.prompts import MAX_ROUNDS, PromptSource, digest_of, step_prompts
from mesh.tasks.scorer import checked_task
from mesh.tasks.spell_backward import SpellBackward
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import Prompt

LONG, UNKNOWN, EMPTY = "z" * 30 + ">", "né>", ""
EVERY = 3  # of `Mixed`'s questions: one in so many is of no use


@dataclass(frozen=True)
class Mixed(SpellBackward):
    """Every third question is too long, has an unknown character, or is empty; in each round other
    ones are."""

    bad: int = EVERY

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        prompts = super().train_prompts(step, num, round)
        texts = {0: LONG, 1: UNKNOWN, 2: EMPTY}
        return [
            replace(p, text=texts[i // self.bad % 3]) if (i + round) % self.bad == 0 else p
            for i, p in enumerate(prompts)
        ]


@dataclass(frozen=True)
class Finite(SpellBackward):
    """A data set: its training prompts are drawn from `all_prompts`."""

    texts: tuple[str, ...] = ()

    def all_prompts(self) -> list[Prompt]:
        return [Prompt(100 + i, text, "") for i, text in enumerate(self.texts or ("abc>",))]


@dataclass(frozen=True)
class RoundlessFinite(Finite):
    def train_prompts(self, step: int, num: int) -> list[Prompt]:  # type: ignore[override]
        return super().train_prompts(step, num)


def source(task: Task, **keys) -> PromptSource:
    known = {"overlong": "stop", "max_length": 32, "max_positions": 4096, "max_new_tokens": 8}
    return PromptSource(task, PromptEncoder(load_tokenizer(CHARACTERS)), **(known | keys))


def refused(process: Process, task: Task, num: int = 4, step: int = 2, **keys) -> str:
    with pytest.raises(ValueError) as caught:
        step_prompts(source(task, **keys), process, Draw(step, num))
    return str(caught.value)


def test_usable_prompts_are_the_task_s_own_in_their_places(process):
    task = Keyed(0)
    prompts, metrics = step_prompts(source(task), process, Draw(5, 6, first_id=8))
    assert [p.prompt_id for p in prompts] == list(range(8, 14))
    assert [p.prompt for p in prompts] == task.train_prompts(5, 6)
    assert all(abs(p.prompt.prompt_id) > 10**6 for p in prompts)
    assert list(metrics) == ["digest/prompts"]


def test_a_step_with_a_long_prompt_ends_the_run_with_what_a_resumed_one_takes(process):
    assert refused(process, LongLater(0)) == (
        f"step 3: model.max_length=32: the prompt '{LONG}' has 31 tokens, which with "
        "generator.max_new_tokens=8 is longer than the context (1 of 4 prompts of step 3); use at "
        "least 39, shorter prompts, or overlong=skip; resume=RUN_DIR takes either key"
    )
    prompts, _ = step_prompts(source(LongLater(0), max_length=39), process, Draw(2, 4))
    assert prompts[2].text == LONG


def test_a_prompt_beyond_the_model_s_own_context_is_not_answered_by_a_longer_one(process):
    message = refused(process, LongLater(0), max_positions=38)
    assert (
        "(1 of 4 prompts of step 3), and the model's own context is 38; shorter prompts" in message
    )
    assert message.endswith("or overlong=skip; resume=RUN_DIR takes that key")
    assert "use at least" not in message


def test_unknown_characters_and_empty_prompts_end_the_run_too(process):
    message = refused(process, Mixed(0), num=9)
    assert "(1 of 9 prompts of step 3); use at least 39" in message
    assert (
        f"cannot encode 'é' in '{UNKNOWN}' (2 of 9 prompts of step 3): change the text" in message
    )
    assert message.endswith("change the text, or overlong=skip; resume=RUN_DIR takes that key")
    assert "model.tokenizer" not in message, "a resumed run refuses it"
    empty = refused(process, Mixed(0, bad=1), num=3, max_length=99)
    assert "cannot encode" in empty and "(2 of 3 prompts of step 3)" in empty


def test_supervised_examples_are_as_long_as_their_solutions(process):
    short = source(SpellBackward(0, 5, 5), max_length=12, teaches=True, max_new_tokens=1)
    assert len(step_prompts(short, process, Draw(0, 4))[0]) == 4
    with pytest.raises(ValueError, match=r"has 12 tokens with its solution .* \(4 of 4 prompts of "
                       "step 1.*use at least 12"):  # fmt: skip
        step_prompts(replace(short, max_length=11), process, Draw(0, 4))


def test_skipped_prompts_are_replaced_in_their_places_by_those_of_later_rounds(process):
    """By hand: of 9 prompts 0, 3 and 6 are of no use, of the 3 that replace them the last one."""
    task = Mixed(0)
    found, metrics = step_prompts(source(task, overlong="skip"), process, Draw(4, 9))
    rounds = [task.train_prompts(4, num, i) for i, num in enumerate((9, 3, 1))]
    expected = [*rounds[0]]
    expected[0], expected[3], expected[6] = rounds[1][0], rounds[1][1], rounds[2][0]
    assert [p.prompt for p in found] == expected
    assert [p.prompt_id for p in found] == list(range(9))
    assert metrics == {"prompts/skipped": 4.0, "digest/prompts": digest_of(rounds[0])}


def test_replacements_depend_on_step_and_places_alone(process):
    skips = source(LongLater(0), overlong="skip")
    found, metrics = step_prompts(skips, process, Draw(2, 4))
    ordinary, other = SpellBackward(0).train_prompts(2, 4), SpellBackward(0).train_prompts(2, 1, 1)
    expected = [*ordinary[:2], other[0], ordinary[3]]
    assert [p.prompt for p in found] == expected and metrics["prompts/skipped"] == 1.0
    assert [p.prompt_id for p in found] == [0, 1, 2, 3], "the others keep their places"
    assert step_prompts(skips, process, Draw(0, 4))[1]["prompts/skipped"] == 0.0


def test_skipping_is_shown_in_every_step_and_warned_about_once():
    warnings = StepWarnings()
    said = [
        warnings.see(step, {"prompts/skipped": n}) for step, n in enumerate((0.0, 2.0, 0.0, 1.0))
    ]
    assert [len(texts) for texts in said] == [0, 1, 0, 0]
    assert said[1][0].startswith("warning: step 1 skipped 2 prompts that leave no room")
    assert columns({"prompts/skipped": 2.0}, Pace(9))["skipped"] == "2 prompts"


def test_a_task_without_enough_usable_prompts_ends_after_so_many_rounds(process):
    message = refused(process, Mixed(0, bad=1), num=3, overlong="skip")
    assert f"3 of 3 prompts are still missing after {MAX_ROUNDS} rounds" in message
    assert f"(100 of {3 * MAX_ROUNDS} that were drawn" not in message
    assert "use at least" not in message, "a resumed run refuses it where prompts are skipped"


@pytest.mark.parametrize("overlong", ["stop", "skip"])
def test_a_finite_data_set_is_looked_at_before_the_start(process, capsys, overlong):
    texts = ("abc>", LONG, "a" * 25 + ">", UNKNOWN, UNKNOWN)
    found = training_problems(process, source(Finite(0, texts=texts), overlong=overlong), 4)
    long = (
        f"model.max_length=32: the prompt '{LONG}' has 31 tokens, which with "
        "generator.max_new_tokens=8 is longer than the context (2 of 5 prompts of the task "
        "(all_prompts)); use at least 39, or shorter prompts"
    )
    unknown = f"cannot encode 'é' in '{UNKNOWN}' (2 of 5 prompts of the task (all_prompts)): change"
    if overlong == "skip":
        assert found == []
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith(f"warning: overlong=skip skips prompts: {long}") and unknown in said
    else:
        assert len(found) == 2 and found[0] == long.replace("39, or shorter", "39, shorter") + (
            ", or overlong=skip"
        )
        assert unknown in found[1] and "or set model.tokenizer" not in found[1]
        assert ", set model.tokenizer to one that can, or overlong=skip" in found[1]


def test_skipping_needs_rounds_and_a_usable_prompt(process):
    (line,) = training_problems(process, source(RoundlessFinite(0), overlong="skip"), 4)
    assert line.startswith("overlong=skip: the task's train_prompts takes no round")
    assert line.endswith("let each round draw other prompts; or set overlong=stop")
    assert training_problems(process, source(RoundlessFinite(0)), 4) == []
    (line,) = training_problems(process, source(Finite(0, texts=(LONG,)), overlong="skip"), 4)
    assert "(1 of 1 prompts of the task (all_prompts))" in line


@dataclass(frozen=True)
class Global(SpellBackward):
    """Draws with the global generator, which nothing seeds."""

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return [Prompt(i, f"{chr(97 + i)}{random.choice('xyz')}>", "") for i in range(num)]


def test_prompts_that_are_others_when_drawn_again_are_refused(process):
    """With the same bits twice in a row in 3^-40 of all runs."""
    with pytest.raises(ValueError, match=r"^the prompts of step 1 are not the same when they are "
                       r"drawn a second time: prompt \d+ is Prompt\(prompt_id"):  # fmt: skip
        training_problems(process, source(Global(0)), 40)


def test_prompts_that_a_fresh_python_draws_otherwise_are_refused(process):
    task, drawn = checked_task(TaskSpec("user_tasks:ByHash", 0), workers=1, num=4)
    assert [text.partition(",")[0] for text in drawn] == [f"Prompt(prompt_id={i}" for i in range(4)]
    with pytest.raises(ValueError, match=r"not the same in a fresh Python: prompt \d is Prompt\("):
        training_problems(process, source(task), 4, drawn)
    task, drawn = checked_task(TaskSpec("user_tasks:Keyed", 0), workers=1, num=4)
    assert drawn == list(map(text_of, task.train_prompts(0, 4)))
    assert training_problems(process, source(task), 4, drawn) == []


def test_a_start_looks_at_the_prompts_of_the_evaluation(process, monkeypatch):
    def refusal(task: str, *words: str) -> str:
        with pytest.raises(Refusal) as caught:
            check(load_conf(["conf=qwen3_tiny", f"task={task}", *words])[1], process)
        return str(caught.value)

    monkeypatch.setattr(SpellBackward, "eval_prompts", lambda self, num: [Prompt(0, LONG, "")])
    message = refusal("spell_backward", "eval.num_prompts=1", "overlong=skip")
    assert re.search(r"\(1 of 1 held-out prompts\); use at least 39, or shorter prompts$", message)


@dataclass(frozen=True)
class Leaky(Finite):
    """From the third step on, its training prompts with index 1 and 3 are held-out ones."""

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        prompts, held_out = super().train_prompts(step, num, round), super().eval_prompts(num)
        leaks = step >= 2
        return [held_out[i] if leaks and i in (1, 3) else p for i, p in enumerate(prompts)]


def test_held_out_prompts_that_are_trained_on_are_counted_and_warned_of_once(process, capsys):
    """Without an evaluation there is nothing to count."""
    task = Leaky(0)
    held_out = HeldOut(task.eval_prompts(9))
    made = source(task, held_out=held_out)
    counts = [step_prompts(made, process, Draw(step, 4))[1] for step in range(5)]
    assert [metrics["prompts/held_out"] for metrics in counts] == [0, 0, 2, 2, 2]
    (line,) = capsys.readouterr().out.splitlines()
    leaked = task.eval_prompts(2)[1].text
    assert line.startswith(
        "warning: 2 of 4 prompts of step 3 are held-out prompts, the first is prompt 1 "
        f"({leaked!r}); evaluations then measure memory too: "
    )
    assert "prompts/held_out" not in step_prompts(source(task), process, Draw(2, 4))[1]


def test_an_answer_or_id_of_its_own_makes_no_other_prompt(process):
    task = Leaky(0)
    held_out = HeldOut([replace(p, prompt_id=77, answer="") for p in task.eval_prompts(9)])
    (_, metrics) = step_prompts(source(task, held_out=held_out), process, Draw(2, 4))
    assert metrics["prompts/held_out"] == 2


def test_a_finite_data_set_is_compared_with_the_held_out_prompts_before_the_start(process, capsys):
    task = Finite(0, texts=("abc>", "abd>", "abe>"))
    held_out = HeldOut([Prompt(0, "xyz>", ""), Prompt(1, "abd>", "")])
    assert training_problems(process, source(task, held_out=held_out), 4) == []
    assert capsys.readouterr().out.startswith(
        "warning: 1 of 3 prompts of the task (all_prompts) are held-out prompts, the first is "
        "prompt 1 ('abd>'); "
    )


def test_a_plan_looks_the_prompts_of_its_evaluation_up(process):
    conf = load_conf(["conf=qwen3_tiny", "eval.num_prompts=5"])[1]
    plan = check(conf, process)
    assert plan.prompts.held_out.texts == {p.text for p in SpellBackward(0).eval_prompts(5)}
    assert len(plan.prompts.held_out.texts) == 5
    assert check(conf, process, held_out=False).prompts.held_out.texts == frozenset()


def test_what_the_start_has_warned_about_no_step_warns_about_again(process, capsys, monkeypatch):
    monkeypatch.setattr(SpellBackward, "all_prompts", lambda self: self.eval_prompts(2), False)
    monkeypatch.setattr(
        SpellBackward, "train_prompts", lambda self, step, num: self.eval_prompts(num)
    )
    plan = check(load_conf(["conf=qwen3_tiny", "eval.num_prompts=5"])[1], process)
    metrics = step_prompts(plan.prompts, process, Draw(0, 4))[1]
    assert metrics["prompts/held_out"] == 4
    assert capsys.readouterr().out.count("are held-out prompts") == 1


def test_held_out_prompts_that_repeat_are_refused(monkeypatch):
    """An evaluation would count one question several times."""
    repeated = [Prompt(i, ("abc>", "d>", "abc>")[i % 3], str(i)) for i in range(6)]
    monkeypatch.setattr(SpellBackward, "eval_prompts", lambda self, num: repeated)
    with pytest.raises(ValueError) as caught:
        draw_held_out(SpellBackward(0), 6)
    assert str(caught.value) == (
        "the task's eval_prompts was asked for 6 prompts and gave 'abc>' twice, at index 0 and 2 "
        "(2 texts in all): return distinct prompts, or lower eval.num_prompts to as many as there "
        "are"
    )
