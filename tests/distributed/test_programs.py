"""The recipes beside `test_recipes`: generate, sft, learning, the large configurations.

Runs on equally many ranks share a launch and are looked at in several tests.
"""

from __future__ import annotations

import json

import pytest
import torch
from chat_tokenizer import CHATML, saved
from launching import OF_A_LAUNCH, Run, launch, runs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mesh.config.schema import PACKAGE_DATA
from mesh.model.families import TINY
from mesh.text.tokenizer import load_tokenizer

EVAL = {
    "eval/accuracy", "eval/accuracy_greedy", "eval/pass@1", "eval/pass@4", "eval/reward",
}  # fmt: skip
SHIPPED = PACKAGE_DATA / "qwen3_tiny"


TEXTS = ["abc>", "hello>", "xyz>", "1e3>", "tomat>"]
RANDOM = ["conf=qwen3_tiny", "model.init=random"]
ONE_STEP = [*RANDOM, "sft.steps=1", "sft.batch_size=4", "eval.num_prompts=8"]
SHORTEST = [
    *ONE_STEP, "generator.max_new_tokens=1", "task_args.min_length=5", "task_args.max_length=5",
    "model.max_length=12",
]  # fmt: skip
LARGE = [
    "model.init=random", "model.flavor=tiny", "device=cpu", "steps=1", "num_prompts=8",
    "group_size=2", "generator.max_new_tokens=8", "eval.num_prompts=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Run]:
    """Runs on one rank, by name."""
    asked = {
        "shortest": ("sft", SHORTEST),
        "path": ("sft", ONE_STEP),
        "flavor": ("sft", [*ONE_STEP, "model.path=null"]),
        "shipped": ("sft", [*RANDOM, "log.tensorboard=false"]),
        "qwen3": ("grpo", ["conf=qwen3", *LARGE]),
    }
    return runs(tmp_path_factory.mktemp("alone"), 1, asked)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict[str, Run]:
    """Runs on two ranks, by name."""
    texts = f"generate.prompts=[{','.join(TEXTS)}]"
    supervised = ["sft.steps=12", "sft.batch_size=32", "eval.num_prompts=16"]
    thirty = ["steps=30", "eval.every=0", "log.tensorboard=false"]
    asked = {
        "generate": ("generate", ["conf=qwen3_tiny_split", texts]),
        "sft": ("sft", [*RANDOM, *supervised]),
        "continued": ("sft", ["conf=qwen3_tiny", "sft.steps=3", "eval.num_prompts=64"]),
        "thirty": ("grpo", ["conf=qwen3_tiny", *thirty]),
        "qwen3_split": ("grpo", ["conf=qwen3_split", *LARGE]),
    }
    return runs(tmp_path_factory.mktemp("on_two"), 2, asked)


def greedy(texts: list[str], max_new_tokens: int = 8) -> list[str]:
    """What `transformers` answers with the shipped model, a prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    answers = []
    for text in texts:
        prompt = tokenizer(text, return_tensors="pt")
        output = model.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = output[0, prompt["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


def test_generate_answers_as_transformers_does(on_two):
    made, answers = on_two["generate"], greedy(TEXTS)
    lines = [line.removesuffix(" ...") for line in made.output.splitlines()]
    assert lines == [f"{text} -> {answer}" for text, answer in zip(TEXTS, answers, strict=True)]
    assert "cba" in answers
    written = {item.name for item in made.path.parent.iterdir()}
    assert written - OF_A_LAUNCH == set()


def test_generate_reads_stdin_and_samples(tmp_path):
    words = ["generate.prompts=-", "generate.num_samples=3", "generate.greedy=false"]
    result = launch("recipes/generate.py", 1, "conf=qwen3_tiny", *words, input="abcde>\n\nzyxwv>\n")
    asked = [line.split(" -> ")[0] for line in result.stdout.splitlines()]
    assert asked == ["abcde>"] * 3 + ["zyxwv>"] * 3
    assert len({line.split(" -> ")[1] for line in result.stdout.splitlines()}) > 2


def test_generate_answers_the_chats_of_a_file_and_writes_them_down(tmp_path):
    """Each row as it would be asked alone; the token ids are those of the chat that it is."""
    tokenizer = saved(tmp_path / "tokenizer", CHATML)
    chat = "<|im_start|>user\nabc><|im_end|>\n<|im_start|>assistant\n"
    ids = load_tokenizer(tokenizer).encode(chat)
    file, output = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    messages = [{"role": "user", "content": "abc>"}]
    rows = [{"prompt": "abc>"}, {"messages": messages}, {"tokens": ids}, {"prompt": "xyz>"},
            {"prompt": "abc>", "prefill": "zz"}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.tokenizer={tokenizer}", "prompt.chat=true", f"generate.file={file}",
             f"generate.output={output}", "model.max_length=100"]  # fmt: skip
    result = launch("recipes/generate.py", 2, "conf=qwen3_tiny", *words)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row | {name: answer[name] for name in row} for row, answer in
            zip(rows, answers, strict=True)] == rows  # fmt: skip
    assert [(a["prompt_id"], a["sample_id"]) for a in answers] == [(i, 0) for i in range(5)]
    first, second, third, _, begun = [(a["response"], a["finish_reason"]) for a in answers]
    assert first == second == third != begun
    shown = [line.partition(" -> ")[2] for line in result.stdout.splitlines()]
    assert [line.removesuffix(" ...") for line in shown[-5:]] == [a["response"] for a in answers]


def test_supervised_steps_lower_the_cross_entropy(on_two):
    made = on_two["sft"]
    losses = [line["loss"] for line in made.metrics[1:]]
    assert [line["step"] for line in made.metrics] == list(range(13))
    assert losses[0] == pytest.approx(torch.tensor(128.0).log().item(), abs=0.3)
    assert losses[-1] < losses[0] - 0.5
    assert [bool(line.keys() & EVAL) for line in made.metrics] == [True, *[False] * 11, True]
    others = {"logprob_diff/max", "ratio/max", "clip_fraction", "digest/weights"}
    assert not any(line.keys() & others for line in made.metrics)
    AutoModelForCausalLM.from_pretrained(made.path / "model")


def test_supervised_steps_continue_from_a_directory(on_two):
    """The shipped model, which is right three times in ten, not random weights."""
    before, first = on_two["continued"].metrics[:2]
    assert 0.15 < before["eval/accuracy"] < 0.45
    assert first["loss"] < 1, "that of random weights is 4.9"


def test_a_supervised_example_may_fill_the_context(alone):
    assert alone["shortest"].metrics[1]["tokens/trained"] == 4 * 6


def test_supervised_needs_no_directory_for_shape_and_tokenizer(alone):
    """As when the shipped checkpoint is made for the first time: from its flavor, the same bits."""
    shipped, flavor = (alone[name].path / "model" for name in ("path", "flavor"))
    for item in shipped.iterdir():
        assert item.read_bytes() == (flavor / item.name).read_bytes()


def test_shipped_checkpoint_is_what_its_recipe_makes(alone):
    """On one kind of CPU to the bit, on others to what the steps make of a rounding difference."""
    made = alone["shipped"]
    ours, shipped = (load_file(p / "model.safetensors") for p in (made.path / "model", SHIPPED))
    assert ours.keys() == shipped.keys()
    difference = torch.cat([(ours[name] - shipped[name]).flatten() for name in shipped])
    size = torch.cat([weight.flatten() for weight in shipped.values()])
    accuracy = made.metrics[-1]["eval/accuracy"]
    relative = float(difference.norm() / size.norm())
    print(f"largest difference {difference.abs().max():.1e}, {relative=:.1e}, {accuracy=:.3f}")
    assert float(difference.abs().max()) < 0.05  # another seed: 0.2, and relative 0.7
    assert relative < 0.1
    assert 0.1 < accuracy < 0.35
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made.path / "model" / name).read_text() == (SHIPPED / name).read_text()


def test_thirty_steps_teach(on_two):
    made = on_two["thirty"]
    accuracies = [line["eval/accuracy"] for line in made.metrics if "eval/accuracy" in line]
    assert len(accuracies) == 2
    before, after = accuracies
    print(f"held-out accuracy {before:.3f} -> {after:.3f}")
    assert 0.1 < before < 0.35
    assert after > max(0.38, before + 0.1)
    assert len(made.samples) == 30 * 32, "four groups of eight"


@pytest.mark.parametrize(("conf", "launched"), [("qwen3", "alone"), ("qwen3_split", "on_two")])
def test_the_large_configuration_runs_with_a_small_model(conf, launched, request):
    made = request.getfixturevalue(launched)[conf]
    first, last = made.metrics
    assert (first["step"], last["step"]) == (0, 1)
    assert last["tokens/trained"] == last["tokens/generated"] > 8
    config = json.loads((made.path / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == TINY.max_positions
