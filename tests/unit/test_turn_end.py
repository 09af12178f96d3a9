"""The end of an assistant's turn: what the chat template says, held against transformers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from chat_tokenizer import CHATML, END_OF_TEXT, EOT, IM_END, PLAIN, saved
from transformers import AutoTokenizer

from mesh.config.loading import load_conf
from mesh.program.assembly import check
from mesh.recipes.sft import answer_end, example
from mesh.tasks import numbered
from mesh.text.tokenizer import Tokenizer, load_tokenizer

HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m['role'] }}<|header|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}"
)
TEMPLATES = {  # with the id that ends an answer
    "chatml": (CHATML, IM_END),
    "headers": (HEADERS, EOT),
    "the tokenizer's eos_token, behind a space": (
        "{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", 1,
    ),
    "a generation prompt that nobody asked for": (CHATML + "<|im_start|>assistant\n", IM_END),
    "marked as generated": (
        "{% for m in messages %}<|im_start|>{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endfor %}", IM_END,
    ),
    "with all that templates may use": (
        "{{ strftime_now('%Y') }}{% for m in messages %}"
        "{% if loop.index > 9 %}{% break %}{% endif %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
        "{{ {'a': 1} | tojson(indent=4) }}{{ m.content }}<|eot_id|>{% endfor %}", EOT,
    ),
}  # fmt: skip


def end_of(tokenizer: Tokenizer) -> int:
    return answer_end(SimpleNamespace(tokenizer=tokenizer))


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_is_the_token_that_follows_an_answer(tmp_path, name, file):
    """In transformers' ids of the same chat too; it is first, and generation stops at all."""
    template, end = TEMPLATES[name]
    tokenizer = load_tokenizer(saved(tmp_path, template, file, eos=[END_OF_TEXT, IM_END]))
    assert end_of(tokenizer) == end and tokenizer.template_problem == ""
    rest = [i for i in (END_OF_TEXT, IM_END, 1) if i != end]
    assert tokenizer.eos_ids == (end, *rest)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "{because}"}]
    ids = theirs.apply_chat_template(chat, return_dict=False)
    answer = tokenizer.encode("{because}")
    (at,) = (i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
    after = [i for i in ids[at + len(answer) :] if i not in tokenizer.encode(" \n")]
    assert after[0] == end


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
@pytest.mark.parametrize(
    ("eos", "ids"),
    [([IM_END, END_OF_TEXT], (IM_END, END_OF_TEXT, 1)), ([EOT, 1], (EOT, 1)), (None, (1,))],
)
def test_without_an_end_in_the_template_the_files_keep_their_order(tmp_path, template, eos, ids):
    tokenizer = load_tokenizer(saved(tmp_path, template, eos=eos))
    assert tokenizer.eos_ids == ids and end_of(tokenizer) == ids[0]


def test_only_special_tokens_and_named_ends_end_a_turn(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<plain><|im_end|>{% endfor %}"
    assert end_of(load_tokenizer(saved(tmp_path / "a", template))) == 1
    assert end_of(load_tokenizer(saved(tmp_path / "b", template, eos=PLAIN))) == PLAIN


def test_of_several_templates_the_default_one_counts(tmp_path):
    several = [{"name": "tools", "template": HEADERS}, {"name": "default", "template": CHATML}]
    assert end_of(load_tokenizer(saved(tmp_path, several))) == IM_END
    tokenizer = load_tokenizer(saved(tmp_path, several[:1]))
    with pytest.raises(ValueError, match="of the templates tools none is called default; correct"):
        end_of(tokenizer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only tools') }}", "TemplateError: only tools"),
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ nowhere.content }}", "UndefinedError: 'nowhere' is undefined"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0] + 1 }}", "raised TypeError"),
        (["{{ eos_token }}"], "chat_template is neither a text nor a list of named templates"),
        ([{"name": "default"}], "the chat_template is not a text"),
        (5, "the chat_template is not a text"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused_where_the_end_is_taught(
    tmp_path, template, said
):
    """Elsewhere a response ends with what the files name."""
    tokenizer = load_tokenizer(saved(tmp_path, template, eos=[IM_END, END_OF_TEXT]))
    assert tokenizer.eos_ids == (IM_END, END_OF_TEXT, 1)
    with pytest.raises(ValueError, match=rf"^model.tokenizer={tmp_path}: its chat .*{said}") as e:
        end_of(tokenizer)
    assert "; correct the template, or remove it: then the first eos_token_id of" in str(e.value)


@pytest.mark.parametrize("eos", ["<eos>", [1, None], 1.5, True])
def test_an_eos_that_is_no_id_names_the_file(tmp_path, eos):
    with pytest.raises(ValueError, match=re.escape(f"eos_token_id {eos!r} is not an id")) as e:
        load_tokenizer(saved(tmp_path, eos=eos))
    assert f"{tmp_path}/generation_config.json: " in str(e.value)


def test_an_example_ends_as_the_chat_does_and_generation_stops_there(tmp_path, process):
    saved(tmp_path, CHATML, eos=[END_OF_TEXT])
    plan = check(load_conf(["conf=qwen3_tiny", f"model.tokenizer={tmp_path}"])[1], process)
    prompt = plan.task.train_prompts(0, 1)[0]
    tokens = example(plan, numbered([prompt])[0]).tokens
    assert tokens == (*plan.tokenizer.encode(prompt.answer), IM_END)
    assert plan.generator.stop_tokens == (IM_END, 1, END_OF_TEXT), "the model's own come first"
