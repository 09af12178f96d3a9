"""Values as text: keys that are given twice, and what a task and a loss get for a written value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest
import torch

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf, read_conf, save_conf
from mesh.config.text import Text, value_as
from mesh.rl.loading import typed_settings
from mesh.rl.losses import Loss, LossTokens, TokenLoss
from mesh.tasks import load_task, typed_args
from mesh.tasks.spell_backward import SpellBackward

HERE = __name__


@dataclass(frozen=True)
class Typed(SpellBackward):
    words: list[str] | None = None
    digits: int = 3
    word: str = ""
    either: str | int = 0
    flag: bool = False
    rate: float = 0.5
    rates: list[float] | None = None
    pair: tuple[int, str] = (0, "")
    ids: tuple[int, ...] = ()
    mode: Literal["no", "yes"] | None = None
    level: Literal[1, 2] = 1
    nested: list[list[int]] | None = None
    table: dict[int, list[str]] | None = None
    anything: Any = None


VALUES = {  # as written, and what the field gets
    "words=[no,yes,012,1:30]": ["no", "yes", "012", "1:30"],
    "words=['a, b',null]": ["a, b", "null"],
    "words=null": None,
    "digits=1_000": 1000,
    "digits=0x10": 16,
    "digits=-4": -4,
    "word=012": "012",
    "word=no": "no",
    "word=null": "null",
    "word=2024-01-02": "2024-01-02",
    "word='a'": "a",
    "word=hello there: [1": "hello there: [1",
    "either=012": "012",
    "either=12": 12,
    "either=no": "no",
    "flag=off": False,
    "flag=yes": True,
    "rate=1": 1.0,
    "rate=1e-3": 1e-3,
    "rate=.5": 0.5,
    "rates=[1,0.5]": [1.0, 0.5],
    "pair=[1,012]": (1, "012"),
    "ids=[3,4,5]": (3, 4, 5),
    "ids=[]": (),
    "mode=no": "no",
    "mode=null": None,
    "level=2": 2,
    "nested=[[1,2],[3]]": [[1, 2], [3]],
    "table={1: [no], 2: []}": {1: ["no"], 2: []},
    "anything=012": "012",
    "anything=12:30": "12:30",
    "anything=no": "no",
    "anything='7'": "7",
    "anything=true": True,
    "anything=1e3": 1000.0,
    "anything=[1,no,{a: 0.5}]": [1, "no", {"a": 0.5}],
}


def same(value: Any, other: Any) -> bool:
    """Equal, with equal types."""
    return repr(value) == repr(other)


@pytest.mark.parametrize("word", VALUES)
def test_a_task_gets_a_written_value_as_the_type_of_its_field(tmp_path, word):
    """Also where it comes from the saved configuration, and a second time from there."""
    _, conf = load_conf(["conf=qwen3_tiny", f"task_args.{word}"])
    for _ in range(3):
        task = load_task(f"{HERE}:Typed", 0, conf.task_args)
        assert same(getattr(task, word.partition("=")[0]), VALUES[word])
        save_conf(conf, tmp_path / "config.yaml")
        assert read_conf(tmp_path / "config.yaml") == conf
        conf = read_conf(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "word",
    [
        "digits=010", "digits=1:30", "digits=1.0", "digits=null", "digits='3'", "digits=true",
        "rate=1:30", "rate=01.5", "rates=[a,b]", "rates=0.5", "pair=[1]", "pair=[a,b]",
        "pair=[1,a,b]", "ids=[1,x]", "ids=3", "mode=maybe", "level=3", "level=true", "words=no",
        "nested=[1]", "nested=[[x]]", "table={a: []}", "table=[1]", "flag=2", "word=[a]",
    ],
)  # fmt: skip
def test_a_value_that_is_not_of_the_fields_type_is_refused(word):
    _, conf = load_conf(["conf=qwen3_tiny", f"task_args.{word}"])
    name, _, text = word.partition("=")
    with pytest.raises(ValueError, match=rf"^task_args\.{name}=.*: (cannot be read as|expected) "):
        load_task(f"{HERE}:Typed", 0, conf.task_args)


def test_a_template_in_braces_is_told_of_quotes():
    with pytest.raises(ValueError, match=r"a mapping; write quotes, as in 'KEY=\"\{a\} \[b\]\"'"):
        load_task(
            f"{HERE}:Typed", 0, load_conf(["conf=qwen3_tiny", "task_args.word={a}"])[1].task_args
        )
    _, conf = load_conf(["conf=qwen3_tiny", 'task_args.word="{a} [b]"'])
    assert load_task(f"{HERE}:Typed", 0, conf.task_args).word == "{a} [b]"


def test_a_yaml_gives_text_without_quotes_and_a_str_with_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "defaults: qwen3_tiny\ntask_args:\n  digits: 12\n  either: '12'\n  words: [no, 1:30]\n"
        "  table:\n    1: [a.b]\n  anything:\n    x.y: '3'\n    z: 3\n"
    )
    _, conf = load_conf([f"conf={path}", "task_args.word=on", "task_args.anything.w=4"])
    for _ in range(2):
        assert typed_args(f"{HERE}:Typed", conf.task_args) == {
            "digits": 12, "either": "12", "words": ["no", "1:30"], "table": {1: ["a.b"]},
            "anything": {"x.y": "3", "z": 3, "w": 4}, "word": "on",
        }  # fmt: skip
        save_conf(conf, tmp_path / "config.yaml")
        conf = read_conf(tmp_path / "config.yaml")


def settled(
    tokens: LossTokens,
    *,
    a=1.0,
    b: float = 1,
    c="",
    d: tuple[int, ...] = (),
    e: float | None = None,
) -> TokenLoss:
    return TokenLoss(tokens.logprobs_T, torch.zeros(4, dtype=torch.bool))


def test_a_loss_gets_the_type_of_its_annotation_or_its_default():
    words = ["a=2", "b=0.5", "c=012", "d=[1,2]", "e=null"]
    _, conf = load_conf(["conf=qwen3_tiny", *(f"loss_args.{word}" for word in words)])
    found = typed_settings(Loss(settled), conf.loss_args)
    assert same(found, {"a": 2.0, "b": 0.5, "c": "012", "d": (1, 2), "e": None})


@pytest.mark.parametrize("text", ["012", "1:30", "1.5.2", "no", "", " 1", "1 ", "0_1", "١x"])
def test_only_a_plain_number_is_one(text):
    assert same(value_as(Text(text), Any), text) and value_as(Text(text), int | str) == text


def problems_of(*words: str) -> list[str]:
    with pytest.raises(Refusal) as caught:
        load_conf(list(words))
    return str(caught.value).splitlines()[1:]


def test_a_key_given_twice_in_a_yaml_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "defaults: qwen3_tiny\nkl_coef: 0.1\ntrainer:\n  lr: 1e-3\n  eps: 1e-8\n  lr: 1e-4\n"
        "kl_coef: 0.1\ntrainer:\n  weight_decay: 0.1\ntask_args: {a: [{b: 1, b: 2}]}\n"
        "generator.top_k: 3\ngenerator: {top_k: 4, tp: 1}\n"
    )
    assert problems_of(f"conf={path}") == [
        f"- {path}: {name} is given twice, in lines {first} and {second}; keep one"
        for name, first, second in [
            ("trainer.lr", 4, 6), ("kl_coef", 2, 7), ("trainer", 3, 8),
            ("task_args.a[0].b", 10, 10), ("generator.top_k", 11, 12),
        ]
    ]  # fmt: skip


def test_the_same_key_in_two_files_and_two_groups_is_no_repetition(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: qwen3_tiny\ntrainer:\n  lr: 1e-3\nsft:\n  lr: 1e-4\ntrainer.tp: 1\n")
    conf = load_conf([f"conf={path}"])[1]
    assert (conf.trainer.lr, conf.sft.lr, conf.trainer.tp) == (1e-3, 1e-4, 1)


def test_a_key_twice_in_a_mapping_of_the_command_line_is_refused():
    (line,) = problems_of("conf=qwen3_tiny", "task_args={a: 1, a: 2}")
    assert "a is given twice, in lines 1 and 1" in line


@pytest.mark.parametrize("word", ["steps=010", "steps=1:30", "trainer.lr=1:30"])
def test_keys_of_the_schema_take_no_number_of_yaml_1_1_either(word):
    (line,) = problems_of("conf=qwen3_tiny", word)
    assert line.startswith(f"- {word}: expected ")


def test_every_key_reads_back_from_the_saved_configuration(tmp_path):
    """Texts that YAML or this program could take for something else among them."""
    odd = ["no", "012", "1:30", "null", "~", "a: b", "#x", " x ", "[a", "{", "'", "", "ß\n1", "1e3"]
    _, conf = load_conf(["conf=qwen3_tiny", "generate.prompts=[1e3,no]", "run_dir=1e3"])
    for text in odd:
        conf.task_args[f"str {text}"] = text
        conf.task_args[f"text {text}"] = Text(text)
    conf.task_args["list"] = [*odd, None, True, 3, 0.5, [1], {"a": "1"}]
    save_conf(conf, tmp_path / "config.yaml")
    found = read_conf(tmp_path / "config.yaml")
    assert [f.name for f in fields(conf) if f.name != "task_args"] and found.run_dir == "1e3"
    for key in (f"{kind} {text}" for kind in ("str", "text") for text in odd):
        assert same(value_as(found.task_args[key], Any), value_as(conf.task_args[key], Any)), key
    assert value_as(found.task_args["list"], Any) == conf.task_args["list"]
    assert found.generate.prompts == ["1e3", "no"]
