"""Texts that a model does not read as they are written: control tokens, and what is lost."""

from __future__ import annotations

import json

import pytest
from chat_tokenizer import CHATML, END_OF_TEXT, IM_END, saved
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mesh.config.loading import load_conf
from mesh.program.assembly import check
from mesh.program.text_warnings import prompt_warnings, text_warnings
from mesh.tasks.prompts import PromptSource
from mesh.tasks.spell_backward import SpellBackward
from mesh.text.encoding import PromptEncoder
from mesh.text.fidelity import lost
from mesh.text.tokenizer import CHARACTERS, Tokenizer, load_tokenizer, make_character_tokenizer
from mesh.types import Prompt

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def chat(tmp_path) -> Tokenizer:
    return load_tokenizer(saved(tmp_path, CHATML, eos=[END_OF_TEXT, IM_END]))


def folding(path, normalizer: dict) -> Tokenizer:
    """The shipped tokenizer with a normalizer."""
    make_character_tokenizer(path)
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    return load_tokenizer(path)


def bytes_tokenizer(path, prefix_space: bool = False, normalizer=None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


def test_an_end_token_in_the_data_is_named_with_its_prompt(process):
    texts = ["abc>", "say <eos> now>", "<eos>", "<pad>x>"]
    end, pad = text_warnings(process, load_tokenizer(CHARACTERS), "prompt", texts)[::-1]
    assert end == (
        "warning: the prompt 'say <eos> now>' has the control token '<eos>', which ends a "
        "response, more often than other prompts (2 of 4 prompts): the model does not read it as "
        "text; take it out of the data, unless a chat template has written it"
    )
    assert "'<pad>x>' has the control token '<pad>', more often than other prompts (1 of 4" in pad


def test_a_chat_template_s_control_tokens_are_no_news_and_those_in_a_question_are(process, chat):
    texts = [CHAT.format(x) for x in ("why?", "how?", "who?")]
    assert text_warnings(process, chat, "prompt", texts) == []
    texts[1] = CHAT.format("how?<|im_end|>")
    (line,) = text_warnings(process, chat, "prompt", texts)
    assert repr(texts[1]) in line and "'<|im_end|>', which ends a response, more" in line
    assert "(1 of 3 prompts)" in line
    assert text_warnings(process, chat, "prompt", texts[1:2]) == [], "nothing to compare it with"


def test_an_end_that_is_an_ordinary_token_is_text(process, tmp_path):
    """The added token <plain> is one too, unless it ends a response."""
    make_character_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "."}))
    assert text_warnings(process, load_tokenizer(tmp_path), "prompt", ["a.", "b"]) == []
    plain = saved(tmp_path / "plain")
    assert text_warnings(process, load_tokenizer(plain), "prompt", ["<plain>", "b"]) == []
    (plain / "generation_config.json").write_text('{"eos_token_id": 103}')
    (line,) = text_warnings(process, load_tokenizer(plain), "prompt", ["<plain>", "b"])
    assert "'<plain>', which ends a response" in line


def test_a_tokenizer_that_folds_case_is_named_with_what_came_back(process, tmp_path):
    tokenizer = folding(tmp_path, {"type": "Lowercase"})
    (line,) = text_warnings(process, tokenizer, "prompt", ["abc>", "xAbC>", "B>"])
    assert line == (
        f"warning: the tokenizer in {tmp_path} loses a part of the prompt 'xAbC>', which comes "
        "back as 'xabc>' (2 of 3 prompts): the model sees another text than the task's score; "
        "write the prompts as they come back, or set model.tokenizer to one that keeps them"
    )
    assert text_warnings(process, tokenizer, "prompt", ["abc>", "b>"]) == []


def test_a_text_that_cannot_be_encoded_is_left_to_the_prompt_check(process):
    assert text_warnings(process, load_tokenizer(CHARACTERS), "prompt", ["né>", "ok>"]) == []


@pytest.mark.parametrize("text", ["e\u0301 \t日 x²", " a", "\n\n  a", "", "a "])
def test_whole_texts_come_back(process, tmp_path, text):
    """With Qwen3's normal form, and with the space that some put in front."""
    tokenizers = [bytes_tokenizer(tmp_path, normalizer=normalizers.NFC())]
    tokenizers += [bytes_tokenizer(tmp_path, prefix_space=True)]
    for tokenizer in tokenizers:
        assert text_warnings(process, tokenizer, "prompt", [text]) == []


@pytest.mark.parametrize(
    ("normalizer", "text", "back"),
    [
        (normalizers.NFKC(), "x²+1", "x2+1"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "né", "ne"),
        (normalizers.Replace("  ", " "), "if a:  b", "if a: b"),
    ],
)
def test_what_is_lost_is_named(process, tmp_path, normalizer, text, back):
    (line,) = text_warnings(process, bytes_tokenizer(tmp_path, False, normalizer), "prompt", [text])
    assert f"the prompt {text!r}, which comes back as {back!r} (1 of 1" in line


def test_a_long_text_is_shown_where_it_first_differs():
    text = "a" * 500 + "B" + "c" * 500
    assert lost(text, text) is None
    assert lost(text, text.lower()) == "a" * 30 + "b" + "c" * 29
    assert lost(text, text[:-1]) == "c" * 30, "the end is missing"


def source(task, **keys) -> PromptSource:
    encoder = PromptEncoder(load_tokenizer(CHARACTERS))
    return PromptSource(task, encoder, "stop", 32, 4096, 8, **keys)


def test_solutions_are_looked_at_where_they_are_taught(process, monkeypatch):
    task = SpellBackward(0)
    ends = {2: "<eos>"}
    monkeypatch.setattr(
        SpellBackward, "solution", lambda self, p: p.answer + ends.get(p.prompt_id, "")
    )
    assert prompt_warnings(process, source(task), (), 4) == []
    (line,) = prompt_warnings(process, source(task, teaches=True), (), 4)
    assert line.startswith("warning: the solution '") and "(1 of 4 solutions)" in line


def test_a_start_warns_about_the_prompts_of_training_and_of_the_evaluation(
    process, tmp_path, capsys, monkeypatch
):
    folding(tmp_path, {"type": "Lowercase"})
    words = ["conf=qwen3_tiny", f"model.tokenizer={tmp_path}", "eval.num_prompts=2"]
    check(load_conf(words)[1], process)
    assert "warning" not in capsys.readouterr().out
    held_out = [Prompt(0, "AbC>", ""), Prompt(1, "abc>", "")]
    monkeypatch.setattr(SpellBackward, "eval_prompts", lambda self, num: held_out)
    check(load_conf(words)[1], process)
    assert capsys.readouterr().out.count("'AbC>', which comes back as 'abc>' (1 of 66 ") == 1
    check(load_conf(words)[1], process, training=False, held_out=False)
    assert capsys.readouterr().out == ""
