"""Chats as tokens: what transformers' apply_chat_template makes of the same messages."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import date

import pytest
from chat_templates import CHATML, DEFAULT_SYSTEM_AND_TOOLS, STRICT, TEMPLATES, THINKING
from some_tokenizers import MADE, starting, write
from transformers import AutoTokenizer

from mesh.text.encoding import PromptEncoder, PromptForm
from mesh.text.template import ChatTemplate
from mesh.text.tokenizer import Unencodable, load_tokenizer
from mesh.types import Prompt, TurnText

USER = {"role": "user", "content": "What is 12*7?\n"}
ANSWER = {"role": "assistant", "content": " It is 84, naïve café. "}
SYSTEM = {"role": "system", "content": "Be brief & <exact>."}
TOOL = {
    "type": "function",
    "function": {"name": "calc", "parameters": {"properties": {"x": {"type": "number"}}}},
}
CALL = {
    "role": "assistant", "content": "",
    "tool_calls": [{"function": {"name": "calc", "arguments": {"x": "12*7", "é": [1, None]}}}],
}  # fmt: skip
THOUGHT = {"role": "assistant", "content": "<think>\n12*7\n</think>\n\n84"}
CHATS = {
    "one": [USER],
    "with a system message": [SYSTEM, USER],
    "two turns": [USER, ANSWER, {"role": "user", "content": "sure?"}],
    "system, three turns": [SYSTEM, USER, ANSWER, USER, ANSWER, USER],
    "ends with an answer": [USER, ANSWER],
    "thought": [USER, THOUGHT, USER],
    "tools": [USER, CALL, {"role": "tool", "content": "84"}, {"role": "tool", "content": "85"}],
    "two users": [USER, USER],
}
ARGUMENTS = {
    "none": {},
    "tools": {"tools": [TOOL]},
    "no thinking": {"enable_thinking": False},
    "a date": {"date_string": "1 Jan 2020", "bos_token": "<|im_start|>"},
}


def pair(path, template, kind="byte-level", **settings):
    """Our tokenizer and transformers', of one directory."""
    directory = write(MADE[kind](), path, chat_template=template, **settings)
    return load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)


def theirs_of(theirs, chat, **arguments):
    """The text, or the error that the template raises."""
    try:
        return theirs.apply_chat_template(chat, tokenize=False, **arguments)
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_chat_reads_as_in_transformers(tmp_path, name):
    """The text with and without a generation prompt, and the tokens; where a template raises
    there, it raises here."""
    ours, theirs = pair(tmp_path, TEMPLATES[name])
    today, rendered = date.today(), 0
    for chat in CHATS.values():
        for arguments in ARGUMENTS.values():
            for generation in (False, True):
                wanted = theirs_of(theirs, chat, add_generation_prompt=generation, **arguments)
                try:
                    text = ours.template.render(chat, today, generation, arguments)
                except ValueError as error:
                    assert wanted in str(error) and wanted.endswith("Error")
                    continue
                assert text == wanted
                rendered += 1
            if chat[-1]["role"] == "assistant" or wanted.endswith("Error"):
                continue
            encoder = PromptEncoder(ours, PromptForm(day=today, arguments=arguments))
            ids = theirs.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False, **arguments
            )
            assert list(encoder.tokens(Prompt(0, "", "", messages=chat))) == ids
    assert rendered >= 16


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"loop controls"}))
def test_an_answer_that_has_begun_is_continued_as_in_transformers(tmp_path, name):
    ours, theirs = pair(tmp_path, TEMPLATES[name])
    encoder = PromptEncoder(ours, PromptForm(day=date.today()))
    for begun in ("The answer", "It is 8"):
        chat = [USER, {"role": "assistant", "content": begun}]
        wanted = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert encoder.chat(Prompt(0, "", "", messages=chat)) == wanted
        prefilled = Prompt(0, "", "", messages=chat, prefill=" is")
        assert list(encoder.tokens(prefilled)) == ours.encode(wanted + " is")


def test_a_prefill_follows_the_generation_prompt(tmp_path):
    ours, theirs = pair(tmp_path, CHATML)
    encoder = PromptEncoder(ours, PromptForm(prefill="It"))
    chat = [USER, {"role": "assistant", "content": "It"}]
    wanted = theirs.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert list(encoder.tokens(Prompt(0, "", "", messages=[USER]))) == wanted
    own = encoder.tokens(Prompt(0, "", "", messages=[USER], prefill="So"))
    assert ours.decode(own).endswith("assistant\nSo"), "a prompt's own takes its place"


def test_of_named_templates_the_one_for_tools_is_taken_where_there_are_tools(tmp_path):
    named = [{"name": "default", "template": CHATML},
             {"name": "tool_use", "template": DEFAULT_SYSTEM_AND_TOOLS}]  # fmt: skip
    ours, theirs = pair(tmp_path / "entries", named)
    for arguments in ({}, {"tools": [TOOL]}):
        wanted = theirs.apply_chat_template([USER], tokenize=False, **arguments)
        assert ours.template.render([USER], date.today(), False, arguments) == wanted
    folder = write(MADE["byte-level"](), tmp_path / "files", chat_template="{{ 'an entry' }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(DEFAULT_SYSTEM_AND_TOOLS)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for arguments in ({}, {"tools": [TOOL]}):
        wanted = theirs.apply_chat_template([USER], tokenize=False, **arguments)
        assert ours.template.render([USER], date.today(), False, arguments) == wanted


def test_special_tokens_of_older_directories_are_read_as_in_transformers(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token is defined }}"
    tokens = {"pad_token": {"__type": "AddedToken", "content": "<unk>"}, "image_token": "<s>"}
    directory = write(MADE["byte-level"](), tmp_path, chat_template=template, **tokens)
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    wanted = AutoTokenizer.from_pretrained(directory).apply_chat_template([USER], tokenize=False)
    ours = load_tokenizer(directory)
    assert ours.template.render([USER], date.today()) == wanted == "<|im_start|></s><unk>True"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_plain_text_begins_as_the_tokenizer_has_it(tmp_path, kind):
    """add_bos_token is for slow tokenizers: transformers obeys tokenizer.json, and so do we."""
    for begins in (False, True):
        for settings in ({}, {"add_bos_token": not begins}):
            backend = starting(MADE[kind]()) if begins else MADE[kind]()
            directory = write(backend, tmp_path / f"{begins}{len(settings)}", **settings)
            ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
            for text in ("the answer", "<s>the answer", "a text"):
                plain = theirs(text, add_special_tokens=False).input_ids
                by_rule = [*([1] if begins and plain[0] != 1 else []), *plain]
                if not text.startswith("<s>"):
                    assert theirs(text).input_ids == by_rule
                for asked, wanted in ((None, by_rule), (False, plain),
                                      (True, [1, *plain] if plain[0] != 1 else plain)):  # fmt: skip
                    encoder = PromptEncoder(ours, PromptForm(begins=asked))
                    assert list(encoder.tokens(Prompt(0, text, ""))) == wanted


def test_a_chat_begins_once_whoever_writes_the_beginning(tmp_path):
    for template in (CHATML, STRICT):
        directory = write(starting(MADE["byte-level"]()), tmp_path, chat_template=template)
        ours = load_tokenizer(directory)
        prompt = Prompt(0, "", "", messages=[USER])
        counts = [PromptEncoder(ours, PromptForm(begins=b)).tokens(prompt).count(1)
                  for b in (None, False, True)]  # fmt: skip
        assert counts == ([0, 0, 1] if template is CHATML else [1, 1, 1])


def conversation(encoder: PromptEncoder, replies, texts) -> list[int]:
    """The tokens of a conversation, as generation puts it together."""
    prompt = Prompt(0, "", "", messages=[USER])
    (end,) = encoder.tokenizer.backend.encode("<|im_end|>").ids
    tokens, turns = list(encoder.tokens(prompt)), []
    for text, reply in zip(texts, [*replies, None], strict=True):
        said = (*encoder.continuation(text), end)
        turns.append(TurnText(text, True, text, said, "stop"))
        tokens += said
        if reply is not None:
            after = encoder.after(prompt, turns, reply)
            turns.append(TurnText("", False, tokens=after))
            tokens += after
    return tokens


def test_replies_are_framed_as_the_template_frames_a_whole_chat(tmp_path):
    """The end of a turn is sampled, and is not written twice."""
    directory = write(MADE["byte-level"](), tmp_path, chat_template=CHATML, eos_token="<|im_end|>")
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    more = [{"role": "user", "content": "sure?"}, {"role": "tool", "content": "84"}]
    tokens = conversation(PromptEncoder(ours), [more[0], more[1:]], ["84", "let me see", "yes"])
    chat = [USER, {"role": "assistant", "content": "84"}, more[0],
            {"role": "assistant", "content": "let me see"}, more[1],
            {"role": "assistant", "content": "yes"}]  # fmt: skip
    whole = theirs.apply_chat_template(chat, return_dict=False)
    assert tokens == whole[: len(tokens)] and ours.decode(whole[len(tokens) :]) == "\n"


def test_what_was_sampled_stays_where_the_template_would_rewrite_it(tmp_path):
    """Qwen3's drops earlier thoughts. Ours keeps the tokens, and the framing is the template's."""
    directory = write(
        MADE["byte-level"](), tmp_path, chat_template=THINKING, eos_token="<|im_end|>"
    )
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    encoder = PromptEncoder(ours, PromptForm(arguments={"enable_thinking": False}))
    thought = "<think>\n12*7\n</think>\n\n84"
    text = ours.decode(
        conversation(encoder, [{"role": "user", "content": "sure?"}], [thought, "yes"])
    )
    opened = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text == (
        f"<|im_start|>user\n{USER['content']}<|im_end|>\n{opened}{thought}<|im_end|>\n"
        f"<|im_start|>user\nsure?<|im_end|>\n{opened}yes<|im_end|>"
    )
    rewritten = theirs.apply_chat_template(
        [USER, {"role": "assistant", "content": thought}, {"role": "user", "content": "sure?"}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False,
    )  # fmt: skip
    assert "12*7</" not in rewritten and "<think>\n12*7" not in rewritten
    assert text.removesuffix("yes<|im_end|>").endswith(rewritten[rewritten.index("84") + 2 :])


def test_an_end_that_was_not_sampled_is_written_by_the_framing(tmp_path):
    """As where a turn ended with a stop string, or at its longest."""
    directory = write(MADE["byte-level"](), tmp_path, chat_template=CHATML, eos_token="<|im_end|>")
    encoder = PromptEncoder(load_tokenizer(directory))
    prompt, said = Prompt(0, "", "", messages=[USER]), encoder.continuation("<calc>")
    reply = {"role": "user", "content": "go on"}
    framing = "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    for tokens, wanted in ((said, "<|im_end|>" + framing), ((*said, 4), framing)):
        turn = TurnText("<calc>", True, "<calc>", tokens, "stop")
        after = encoder.after(prompt, [turn], reply)
        assert encoder.tokenizer.decode(after) == wanted
    assert encoder.after(prompt, [], "=84;") == tuple(encoder.tokenizer.encode("=84;"))


def test_a_text_in_the_middle_has_no_space_of_a_first_word(tmp_path):
    """sentencepiece puts one in front of every text: here the text goes on."""
    ours = load_tokenizer(write(MADE["sentencepiece"](), tmp_path))
    whole = ours.encode("the answer is there")
    begin = ours.encode("the answer")
    encoder = PromptEncoder(ours)
    assert (*begin, *encoder.continuation(" is there")) == tuple(whole)
    assert ours.decode([*begin, *encoder.continuation("s are")]) == "the answers are"
    tokens = encoder.tokens(Prompt(0, "", "", tokens=begin, prefill="s are"))
    assert ours.decode(tokens) == "the answers are"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (STRICT, [USER, USER], "it fails on these messages: TemplateError: Roles must alternate"),
        (CHATML, [{"role": "user"}], "UndefinedError: 'dict object' has no attribute 'content'"),
        (CHATML, [{"role": "user", "content": 3}], "raised TypeError"),
        ("{{ messages[0].content }}", [USER, {"role": "assistant", "content": "It"}],
         "it does not show the assistant's message at the end"),
        (None, [USER], "has no chat template, and the prompt is a chat"),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_how(tmp_path, template, messages, said):
    ours = load_tokenizer(write(MADE["byte-level"](), tmp_path, chat_template=template))
    with pytest.raises(Unencodable) as caught:
        PromptEncoder(ours).tokens(Prompt(0, "", "", messages=messages))
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_date_is_that_of_the_form(tmp_path):
    ours, _ = pair(tmp_path, TEMPLATES["headers and date"])
    encoder = PromptEncoder(ours, PromptForm(day=date(2024, 2, 29)))
    assert "Today Date: 29 Feb 2024\n" in encoder.chat(Prompt(0, "", "", messages=[USER]))
    assert ours.template.reads_date and not ChatTemplate(CHATML).reads_date
    given = replace(encoder, form=PromptForm(arguments={"date_string": "today"}))
    assert "Today Date: today\n" in given.chat(Prompt(0, "", "", messages=[USER]))


def test_the_room_does_without_torch_and_transformers():
    """Scoring processes have it, and start in a moment."""
    import subprocess

    code = "import sys, mesh.text.encoding, mesh.text.stopping; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers"} & set(loaded.stdout.split())
