"""The keys `prompt.*`, what they make of a task's prompts, and what of them is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pytest
from chat_templates import CHATML, STRICT, TEMPLATES
from chat_tokenizer import saved
from some_tokenizers import MADE, starting, write

from mesh.config.loading import from_yaml, load_conf, to_yaml
from mesh.program.assembly import check
from mesh.program.encoding import dated
from mesh.program.shared import inputs_of
from mesh.tasks import TaskSpec, TokenizerFiles, checked
from mesh.tasks.scorer import checked_task
from mesh.tasks.spell_backward import SpellBackward
from mesh.text.few_shot import Shot, read_shots
from mesh.text.prompt_file import read_prompts
from mesh.text.tokenizer import CHARACTERS
from mesh.types import Prompt


@dataclass(frozen=True)
class Asks(SpellBackward):
    """Every prompt is a chat, or is made by `form`."""

    form: str = "messages"

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return [self.formed(p) for p in super().train_prompts(step, num, round)]

    def eval_prompts(self, num: int) -> list[Prompt]:
        return [self.formed(p) for p in super().eval_prompts(num)]

    def formed(self, prompt: Prompt) -> Prompt:
        messages = [{"role": "user", "content": prompt.text}]
        return {
            "messages": replace(prompt, text="", messages=messages),
            "two users": replace(prompt, text="", messages=messages * 2),
            "both": replace(prompt, messages=messages),
            "no role": replace(prompt, text="", messages=[{"content": "a"}]),
            "tokens": replace(prompt, text="", tokens=[2, 3]),
            "texts": replace(prompt, text="", tokens=["a"]),
            "strange": replace(prompt, text="", tokens=[2, 999]),
        }[self.form]


def planned(process, *words, tokenizer=None, task=None):
    named = [] if tokenizer is None else [f"model.tokenizer={tokenizer}"]
    name = [f"task={__name__}:{task}", "reward.workers=0"] if task else []
    conf = load_conf(["conf=qwen3_tiny", *named, *name, *words])[1]
    return check(conf, process)


def refused(process, *words, **keys) -> str:
    with pytest.raises(ValueError) as caught:
        planned(process, *words, **keys)
    return str(caught.value)


def shown(plan, prompt: Prompt) -> str:
    return plan.tokenizer.decode(plan.encoder.tokens(prompt))


def test_the_shipped_task_has_the_tokens_of_its_text(process):
    plan = planned(process)
    for prompt in plan.task.train_prompts(0, 4):
        assert plan.encoder.tokens(prompt) == tuple(plan.tokenizer.encode(prompt.text))


def test_a_text_becomes_a_chat_with_all_that_the_keys_say(process, tmp_path):
    shots = tmp_path / "shots.jsonl"
    more = {"messages": [{"role": "user", "content": "x>"}, {"role": "assistant", "content": "x"}]}
    rows = [{"question": "ab>", "answer": "ba"}, more]
    shots.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    plan = planned(
        process, "prompt.chat=true", "prompt.system=Spell.", "prompt.prefill=It is ",
        "prompt.prefix=Now ", f"prompt.few_shot={shots}", "model.max_length=400",
        tokenizer=saved(tmp_path / "chat", CHATML),
    )  # fmt: skip
    said = [("system", "Spell."), ("user", "ab>"), ("assistant", "ba"), ("user", "x>"),
            ("assistant", "x"), ("user", "Now cd>")]  # fmt: skip
    chat = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
    begun = f"{chat}<|im_start|>assistant\nIt is "
    assert shown(plan, Prompt(0, "cd>", "dc")) == begun
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "e>"}]
    text = shown(plan, Prompt(0, "", "", messages=own))
    assert text.startswith("<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user\nab>")
    assert "Spell" not in text and "Now" not in text
    assert plan.encoder.tokens(Prompt(0, "", "", tokens=(7, 8))) == (
        7, 8, *plan.tokenizer.encode("It is "),
    )  # fmt: skip


def test_plain_text_has_its_prefix_behind_the_examples_as_a_chat_has(process, tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"question": "ab>", "answer": "ba"}\n{"question": "c>", "answer": "c"}\n')
    plan = planned(process, "prompt.prefix=Spell\n", f"prompt.few_shot={shots}",
                   "prompt.prefill=z", "model.max_length=100")  # fmt: skip
    assert shown(plan, Prompt(0, "cd>", "dc")) == "ab>ba\nc>c\nSpell\ncd>z"


def test_template_arguments_have_types_and_reach_the_template(process, tmp_path):
    template = "{{ flag is false }}{{ number + 1 }}{{ names[1] }}{{ messages[0].content }}"
    plan = planned(
        process, "prompt.chat=true", "prompt.template_args.flag=false",
        "prompt.template_args.number=3", "prompt.template_args.names=[a, b]",
        tokenizer=saved(tmp_path, template),
    )  # fmt: skip
    assert shown(plan, Prompt(0, "cd>", "dc")) == "True4bcd>"


def test_arguments_come_back_from_the_yaml_of_a_run(process):
    words = ["conf=qwen3_tiny", "prompt.template_args.flag=false", "prompt.template_args.a.b=1"]
    conf = load_conf(words)[1]
    assert conf.prompt.template_args == {"flag": "false", "a": {"b": "1"}}
    assert from_yaml(to_yaml(conf)) == conf
    assert conf.task_args == {} or "flag" not in conf.task_args


def test_the_day_of_the_start_is_kept_where_the_template_reads_it(process, tmp_path):
    reads = saved(tmp_path / "reads", TEMPLATES["headers and date"])
    plain = saved(tmp_path / "plain", CHATML)
    for directory, kept in ((reads, date.today().isoformat()), (plain, None), (CHARACTERS, None)):
        conf = load_conf(["conf=qwen3_tiny", f"model.tokenizer={directory}"])[1]
        assert dated(conf, process).prompt.date == kept
    words = [f"model.tokenizer={reads}", "prompt.date=2024-02-29", "prompt.chat=true"]
    conf = load_conf(["conf=qwen3_tiny", "model.max_length=200", *words])[1]
    assert dated(conf, process) == conf
    assert "Date: 29 Feb 2024" in shown(check(conf, process), Prompt(0, "a>", "a"))


def test_a_resume_compares_the_template_and_the_examples(process, tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"question": "ab>", "answer": "ba"}\n')
    directory = saved(tmp_path / "chat", CHATML, file=True)
    words = [f"model.tokenizer={directory}", f"prompt.few_shot={shots}", "model.max_length=200"]
    conf = load_conf(["conf=qwen3_tiny", *words])[1]
    plan = check(conf, process)
    before = inputs_of(conf, plan).files
    (directory / "chat_template.jinja").write_text(CHATML + " ")
    shots.write_text('{"question": "ab>", "answer": "bb"}\n')
    after = inputs_of(conf, plan).files
    names = {name for name in before if before[name] != after[name]}
    assert names == {"chat_template.jinja of the tokenizer", "shots.jsonl of the prompt"}


@pytest.mark.parametrize(
    ("words", "template", "said"),
    [
        (["prompt.chat=true"], None, "prompt.chat=true: the tokenizer in .* has no chat template"),
        (["prompt.bos=true"], None, "prompt.bos=true: .*tokenizer_config.json names no bos_token"),
        (["prompt.date=today"], CHATML, "prompt.date=today: is no day .*; write it as 2026-01-31"),
        (["prompt.system=a"], CHATML, "is plain text, which has no part for prompt.system .64 of"),
        (["prompt.template_args.messages=1", "prompt.chat=true"], CHATML,
         "prompt.template_args.messages=1: every template is given that by the program"),
        (["prompt.few_shot=/nowhere"], CHATML, "prompt.few_shot=/nowhere: cannot be read"),
        (["prompt.chat=true"], "{{ raise_exception('no') }}",
         "it fails on these messages: TemplateError: no"),
        (["prompt.chat=true", "prompt.system=a"], STRICT,
         "it fails on these messages: TemplateError: Roles must alternate"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_obeyed_are_refused(process, tmp_path, words, template, said):
    directory = saved(tmp_path, template) if template else CHARACTERS
    message = refused(process, *words, tokenizer=directory)
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no line"),
        ("{", "line 1 is no JSON"),
        ('{"question": "a", "answer": "b"}\n[1]', "line 2 is no JSON object"),
        ('{"question": "a"}', "line 1 has no text answer; write"),
        ('{"question": "a", "answer": 3}', "line 1 has no text answer"),
        ('{"messages": []}', "line 1: messages is no list of messages"),
        ('{"messages": [{"content": "a"}]}', "line 1: messages has {'content': 'a'} at index 0"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "set prompt.chat=true, or give quest"),
    ],
)
def test_rows_that_are_no_example_are_named(process, tmp_path, content, said):
    (tmp_path / "shots.jsonl").write_text(content)
    message = refused(process, f"prompt.few_shot={tmp_path}/shots.jsonl")
    assert said in message and "\n\n" not in message


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("two users", "the chat template in .*: it fails on these messages: TemplateError: Roles"),
        ("both", "gave the prompt .* has text and messages, at index 0; give a text, messages"),
        ("no role", "gave the messages .*has {'content': 'a'} at index 0, which is no message"),
        ("texts", r"gave the tokens \['a'\] of a prompt, which are no ids"),
        (
            "strange",
            r"the prompt '\[2, 999\]' has the token id 999, which the tokenizer in .* does not",
        ),
    ],
)
def test_prompts_of_another_form_are_refused(process, tmp_path, form, said):
    message = refused(process, f"task_args.form={form}", "model.max_length=200",
                      tokenizer=saved(tmp_path, STRICT), task="Asks")  # fmt: skip
    assert re.search(said, message), message


def test_messages_without_a_template_are_refused(process):
    message = refused(process, task="Asks", tokenizer=CHARACTERS)
    assert "has no chat template, and the prompt is a chat (64 of 64 prompts of step 1)" in message
    assert "add chat_template.jinja to that directory, or give prompts as plain text" in message
    plan = planned(process, "task_args.form=tokens", "eval.num_prompts=1", task="Asks",
                   tokenizer=CHARACTERS)  # fmt: skip
    assert plan.encoder.tokens(plan.task.train_prompts(0, 1)[0]) == (2, 3)


def test_a_prompt_of_nothing_is_no_fault_of_its_form():
    """It has no token, which another prompt may replace (overlong=skip)."""
    assert checked([Prompt(0, "", "")], 1, "train_prompts")


def test_a_task_is_told_the_tokenizer_in_ranks_and_scoring_processes():
    """A process draws the first prompts, in which is what it was told."""
    from user_tasks import Told

    files = TokenizerFiles(Path(CHARACTERS))
    task, drawn = checked_task(TaskSpec("user_tasks:Told", 0, {}, {}, files), workers=1, num=1)
    assert isinstance(task, Told) and task.train_prompts(0, 1)[0].text == "98>"
    assert "98>" in drawn[0]
    with pytest.raises(ValueError, match="use_tokenizer needs the tokenizer, which could not be"):
        checked_task(TaskSpec("user_tasks:Told", 0), workers=0)


def test_prompts_come_from_files(tmp_path):
    lines, rows = tmp_path / "questions.txt", tmp_path / "questions.jsonl"
    lines.write_text("one\n\n two \n")
    assert [p.text for p in read_prompts(lines)] == ["one", " two "]
    messages = [{"role": "user", "content": "three"}]
    found = [
        {"prompt": "one"},
        {"text": "two", "prefill": "So"},
        {"messages": messages},
        {"tokens": [1, 2]},
        {"prompt": "six", "answer": "6", "info": {"low": 1}},
        {"messages": messages, "answer": 3},
        {"prompt": "x", "answer": ["a"], "info": "b"},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    assert read_prompts(rows) == [
        Prompt(0, "one", ""), Prompt(1, "two", "", prefill="So"),
        Prompt(2, "", "", messages=messages), Prompt(3, "", "", tokens=[1, 2]),
        Prompt(4, "six", "6", info={"low": 1}), Prompt(5, "", "3", messages=messages),
        Prompt(6, "x", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no line"),
        ("{}", "line 1 has none of these columns; write"),
        ('\n{"prompt": "a", "tokens": [1]}', "line 2 has prompt and tokens"),
        ('{"prompt": 3}', "line 1: the prompt 3 is no text"),
        ('{"messages": "a"}', "line 1: messages is no list of messages"),
        ('{"tokens": [1.5]}', "line 1: tokens are no list of ids"),
        ('{"prompt": "a", "prefill": 1}', "line 1: the prefill 1 is no text"),
        ("a", "line 1 is no JSON"),
    ],
)
def test_rows_that_are_no_prompt_are_named(tmp_path, content, said):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / "a.jsonl")


def test_a_text_begins_by_the_key(process, tmp_path):
    directory = write(starting(MADE["byte-level"]()), tmp_path)
    begin = {"null": True, "true": True, "false": False}
    for word, begins in begin.items():
        conf = ["model.init=random", "model.path=null", "model.flavor=0.6B", "prompt.chat=false"]
        plan = planned(process, *conf, f"prompt.bos={word}", tokenizer=directory)
        assert (plan.encoder.tokens(Prompt(0, "ab", ""))[0] == 1) == begins


def test_only_a_line_break_ends_a_line_of_a_file(tmp_path):
    """U+2028, U+0085 and the form feed may stand in a text, in JSON unescaped too."""
    text = "one\u2028two\u0085three"
    row = {"prompt": text, "question": text, "answer": "a"}
    file = tmp_path / "a.jsonl"
    file.write_text("\n" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [p.text for p in read_prompts(file)] == [text]
    assert read_shots(file) == (Shot(text, "a"),)
    plain = tmp_path / "a.txt"
    plain.write_text(f"{text}\x0cfour\n", encoding="utf-8")
    assert [p.text for p in read_prompts(plain)] == [f"{text}\x0cfour"]
