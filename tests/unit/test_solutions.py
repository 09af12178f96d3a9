"""What recipes/sft.py teaches: solutions of several turns, epochs, and the learning rate.

Costs about 5 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from chat_tokenizer import CHATML, IM_END, saved

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.program.assembly import check
from mesh.program.encoding import stop_problems, turn_ends
from mesh.recipes.sft import example, examples_of, prompts_of, scheduled, teaching
from mesh.roles.optimizer import OptimizerSettings, lr_at
from mesh.tasks import numbered
from mesh.tasks.epochs import batch_of, steps_per_epoch
from mesh.tasks.prompts import PromptSource
from mesh.tasks.solution import Solution, solution_of, taught
from mesh.tasks.spell_backward import SpellBackward
from mesh.tasks.stops import stop_strings
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import CHARACTERS, Unencodable, load_tokenizer
from mesh.types import Prompt, Turn, TurnText

EOS = 1
CALL = [("<calc>1+1</calc>", True), ("=2;", False), ("2", True)]


@dataclass(frozen=True)
class Solved(SpellBackward):
    """Its solution is whatever `turns` is."""

    turns: Any = ""
    stop_strings: Any = ()

    def solution(self, prompt: Prompt) -> Any:
        return self.turns


@dataclass(frozen=True)
class Words(SpellBackward):
    """A data set of so many words, of which the last is too long."""

    size: int = 10
    long: bool = False

    def all_prompts(self) -> list[Prompt]:
        texts = [f"{'abcdefghijklmnopqrstuvwxyz'[i] * 3}>" for i in range(self.size)]
        texts += ["z" * 30 + ">"] if self.long else []
        return [Prompt(i, text, text[-2::-1]) for i, text in enumerate(texts)]


def characters() -> PromptEncoder:
    return PromptEncoder(load_tokenizer(CHARACTERS))


def ids(text: str) -> tuple[int, ...]:
    return tuple(characters().tokenizer.encode(text))


def of_turns(turns: Any) -> Solution:
    return solution_of(Solved(0, turns=turns), Prompt(0, "1+1=", "2"))


@pytest.mark.parametrize(
    "turns",
    [CALL, tuple(CALL), list(map(list, CALL)), [TurnText(text, said) for text, said in CALL]],
)
def test_a_solution_is_a_text_or_turns_that_alternate(turns):
    assert of_turns("2") == Solution(("2",))
    assert of_turns(turns) == Solution(("<calc>1+1</calc>", "2"), ("=2;",))
    message = {"role": "user", "content": "lower"}
    assert of_turns([("5", True), (message, False), ("4", True)]).replies == (message,)
    assert of_turns([("5", True), ([message], False), ("4", True)]).replies == ([message],)


@pytest.mark.parametrize(
    "turns",
    [None, 5, [], ["2"], [("2", 1)], [("2", False)], CALL[:2], CALL[1:], [CALL[0], CALL[2]],
     [(2, True)], [*CALL[:1], *CALL], [("a", True, 1)]],
    ids=repr,
)  # fmt: skip
def test_a_solution_of_another_form_is_refused(turns):
    with pytest.raises(ValueError, match=r"the task's solution returned .*; return a text, or tur"):
        of_turns(turns)


@pytest.mark.parametrize("reply", [None, 5, [], ["x"], [{"role": "user"}, 5]], ids=repr)
def test_a_reply_of_another_form_is_refused(reply):
    with pytest.raises(
        ValueError, match="the task's solution has a reply that cannot be used: ret"
    ):
        of_turns([("a", True), (reply, False), ("b", True)])


@pytest.mark.parametrize("stops", [("</calc>",), ("never", "</calc>"), ()])
def test_sampled_turns_end_with_a_stop_string_or_the_end_token(stops):
    made = taught(characters(), Prompt(0, "1+1=", "2"), of_turns(CALL), EOS, stops)
    call = ids("<calc>1+1</calc>") + (() if stops else (EOS,))
    assert made.tokens == (*call, *ids("=2;2"), EOS)
    assert made.turns == (Turn(len(call), True), Turn(3, False), Turn(2, True))


def test_a_solution_of_one_turn_is_a_rollout_of_one():
    made = taught(characters(), Prompt(0, "1+1=", "2"), of_turns("2"), EOS, ("</calc>",))
    assert (made.tokens, made.turns) == ((*ids("2"), EOS), ())
    made = taught(characters(), Prompt(0, "1+1=", "2"), of_turns("2;"), EOS, (";",))
    assert (made.tokens, made.turns) == (ids("2;"), ())


def test_a_turn_that_goes_on_behind_a_stop_string_is_refused():
    with pytest.raises(Unencodable, match="goes on behind the stop string ';', where generation"):
        taught(characters(), Prompt(0, "1+1=", "2"), of_turns("2; 3;"), EOS, (";",))


def test_messages_between_turns_have_the_framing_of_the_template(tmp_path):
    """As the template renders the whole conversation, but for what was not said by the policy."""
    encoder = PromptEncoder(load_tokenizer(saved(tmp_path, CHATML)))
    ask, lower = ({"role": "user", "content": text} for text in ("which number?", "lower"))
    prompt = Prompt(0, "", "4", messages=[ask])
    solution = of_turns([("5", True), (lower, False), ("4", True)])
    made = taught(encoder, prompt, solution, IM_END, ())
    turns = [Turn(2, True), Turn(len(made.tokens) - 4, False), Turn(2, True)]
    assert list(made.turns) == turns
    assert encoder.tokenizer.decode(made.tokens) == (
        "5<|im_end|>\n<|im_start|>user\nlower<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    )


def test_an_example_carries_loss_on_what_the_policy_says(process):
    words = ["conf=qwen3_tiny", "task=calculator", "model.max_length=96", "eval.num_prompts=4"]
    plan = teaching(check(load_conf([*words, "num_prompts=4"])[1], process))
    for prompt in numbered(plan.task.train_prompts(0, 4)):
        made = example(plan, prompt)
        call, (reply, _), (answer, _) = plan.task.solution(prompt.prompt)
        text = plan.tokenizer.decode(made.tokens)
        assert text == f"{call[0]}{reply}{answer}<eos>"
        assert made.prompt_tokens == ids(prompt.text)
        said = [t for t, counts in zip(made.tokens, made.loss_mask, strict=True) if counts]
        assert plan.tokenizer.decode(said) == f"{call[0]}{answer}<eos>"
        assert made.length == len(said) == len(made.logprobs)


@pytest.mark.parametrize("stops", [5, "x", [""], [5], None])
def test_stop_strings_that_are_no_texts_are_refused(stops):
    with pytest.raises(ValueError, match="the task's stop_strings is"):
        stop_strings(Solved(0, stop_strings=stops))
    assert stop_strings(SpellBackward(0)) == ()


def test_the_stop_strings_a_task_are_added_to_those_of_the_configuration():
    conf = load_conf(["conf=qwen3_tiny", "generator.stop=[x,;]"])[1]
    task, tokenizer = Solved(0, stop_strings=[";", "é"]), load_tokenizer(CHARACTERS)
    assert turn_ends(conf, task) == ("x", ";", "é")
    (line,) = stop_problems(conf, tokenizer, task)
    assert line.startswith("task=spell_backward: its stop_strings has 'é', and no response could")
    assert stop_problems(conf, tokenizer, Solved(0, stop_strings=["!"])) == []


@pytest.mark.parametrize(("num", "size"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_each_item_comes_once_in_each_epoch_in_another_order(num, size):
    per_epoch = steps_per_epoch(num, size)
    epochs = [
        [i for step in range(e * per_epoch, (e + 1) * per_epoch)
         for i in batch_of(num, size, 7, step)]
        for e in range(5)
    ]  # fmt: skip
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    if num == 10:
        assert len(set(map(tuple, epochs))) == 5
        assert [len(batch_of(num, size, 7, step)) for step in range(4)] == [4, 4, 2, 4]
        assert batch_of(num, size, 8, 0) != batch_of(num, size, 7, 0)
        assert batch_of(num, size, 7, 0) == batch_of(num, size, 7, 0)


def source(task: Any, **keys: Any) -> PromptSource:
    known = {"overlong": "stop", "max_length": 32, "max_positions": 4096, "max_new_tokens": 8}
    return PromptSource(task, characters(), **(known | keys), teaches=True)


def test_epochs_take_everything_that_can_be_used_once(process):
    conf = load_conf(["conf=qwen3_tiny", "sft.epochs=2", "sft.batch_size=4", "seed=3"])[1]
    given = source(Words(0, long=True), overlong="skip")
    examples = examples_of(conf, given, process)
    assert [p.text[0] for p in examples] == list("abcdefghij"), "the long one is left out"
    taken = [prompts_of(conf, given, process, examples, step) for step in range(6)]
    texts = [[p.text for p in prompts] for prompts, _ in taken]
    assert sorted(sum(texts[:3], [])) == sorted(sum(texts[3:], [])) == [p.text for p in examples]
    assert texts[:3] != texts[3:] and [len(t) for t in texts] == [4, 4, 2] * 2
    assert [metrics["epoch"] for _, metrics in taken] == pytest.approx([n / 3 for n in range(1, 7)])
    assert len({metrics["digest/prompts"] for _, metrics in taken}) == 6


def test_without_epochs_the_task_draws(process):
    conf = load_conf(["conf=qwen3_tiny", "sft.batch_size=4"])[1]
    given = source(Words(0))
    assert examples_of(conf, given, process) == []
    prompts, metrics = prompts_of(conf, given, process, [], 5)
    assert [p.prompt for p in prompts] == given.task.train_prompts(5, 4)
    assert "epoch" not in metrics


def test_epochs_of_a_task_without_a_data_set_are_refused(process):
    conf = load_conf(["conf=qwen3_tiny", "sft.epochs=2"])[1]
    with pytest.raises(Refusal) as caught:
        examples_of(conf, source(SpellBackward(0)), process)
    assert str(caught.value).endswith(
        "sft.epochs=2: task=spell_backward draws prompts without end: it has no all_prompts; "
        "set sft.steps instead"
    )


def test_epochs_decide_how_many_steps_the_learning_rate_decays_over(process):
    words = ["conf=qwen3_tiny", "sft.epochs=3", "sft.batch_size=4", "trainer.decay=linear"]
    plan = check(load_conf(["conf=qwen3_tiny"])[1], process)
    conf, plan = scheduled(load_conf(words)[1], plan, 10)
    assert conf.steps == 9
    assert (plan.trainer.optimizer.decay, plan.trainer.optimizer.steps) == ("linear", 9)


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_the_learning_rate_rises_and_then_decays_to_zero(decay):
    def rate(step: int) -> float:
        keys = OptimizerSettings(2.0, (0.9, 0.9), 1e-8, 0.0, 4, 1.0, decay, 12)
        return lr_at(step, keys)

    assert [rate(step) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    middle = {"none": 2.0, "linear": 1.0, "cosine": 1.0}[decay]
    assert rate(8) == pytest.approx(middle)
    quarter = {"none": 2.0, "linear": 1.5, "cosine": 1 + math.cos(math.pi / 4)}[decay]
    assert rate(6) == pytest.approx(quarter)
    assert rate(11) > 0 and rate(12) == pytest.approx(2.0 if decay == "none" else 0.0)
