"""Mistakes of a user: one Refusal with key, value and remedy, before a model is built.

The command line is read and checked as a recipe's `main` does it. Launched recipes:
faults/test_refusals.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.config.schema import PACKAGE_DATA
from mesh.lifecycle.process import Process
from mesh.program.assembly import check

SHIPPED = PACKAGE_DATA / "qwen3_tiny"
Refuse = Callable[..., str]


@pytest.fixture
def refusal(process: Process) -> Refuse:
    """The message with which a start on `world_size` ranks is refused."""

    def message(*words: str, world_size: int = 2, conf: str = "qwen3_tiny") -> str:
        with pytest.raises(Refusal) as caught:
            of_world = replace(process, world_size=world_size)
            check(load_conf([f"conf={conf}", *words])[1], of_world)
        return str(caught.value)

    return message


def lines(message: str) -> list[str]:
    return [line.removeprefix("- ") for line in message.splitlines()[1:]]


@pytest.fixture(autouse=True)
def no_model_is_built(monkeypatch):
    """Giving a model memory fails; `check` must not come that far."""

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built before the configuration was checked")

    monkeypatch.setattr(torch.nn.Module, "to_empty", build)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint, to be damaged."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "model"))


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of model.safetensors."""
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def edit(model: Path, **entries: Any) -> None:
    """Set entries of config.json; None removes one."""
    path = model / "config.json"
    merged = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))


CASES = {  # words, ranks, and what the one problem must say: key=value, what is wrong, remedy
    "misspelt": (["trainer.lrr=1"], 2, ["trainer.lrr=1: unknown key", "did you mean trainer.lr"]),
    "key without its group": (["lr=1"], 2, ["lr=1: unknown key", "did you mean trainer.lr"]),
    "wrong type": (["steps=many"], 2, ["steps=many: expected an integer", "steps=100"]),
    "wrong choice": (["mesh.mode=splt"], 2, ["mesh.mode=splt: expected one of", "mesh.mode=split"]),
    "group of one": (["group_size=1"], 2, ["group_size=1: must be >= 2", "default is 8"]),
    "not a number": (["kl_coef=nan"], 2, ["kl_coef=nan: must be >= 0 and finite"]),
    "batch, ranks": (["num_prompts=63"], 2, ["num_prompts=63: is not a multiple of 2", "62 or 64"]),
    "batch and waves": (["waves=3"], 2, ["num_prompts=64: is not a multiple of 6", "60 or 66"]),
    "context too long": (
        ["model.max_length=4097"], 2,
        ["model.max_length=4097: the model's own context is 4096 tokens", "use at most 4096"],
    ),
    "two prompts of one id": (
        ["task=user_tasks:Twice"], 2,
        ["train_prompts was asked for 64 prompts and gave prompt_id=3 twice, at index 3 and 7; "
         "give each prompt of a call an id of its own"],
    ),
    "too few prompts": (
        ["task=user_tasks:Short"], 2,
        ["eval_prompts was asked for 256 prompts and gave 255; return 256"],
    ),
    "too few questions": (
        ["eval.num_prompts=60", "task_args.min_length=1", "task_args.max_length=1"], 2,
        ["eval.num_prompts=60: found only ", "ask for at most"],
    ),
    "response too long": (
        ["model.max_length=8"], 2,
        ["generator.max_new_tokens=8: leaves no room for a prompt", "use at most 7"],
    ),
    "tp and heads": (["trainer.tp=8"], 8, ["trainer.tp=8: does not divide the model's 4 heads"]),
    "generator tp": (
        ["generator.tp=3", "num_prompts=63"], 3,
        ["generator.tp=3: does not divide the model's 4 heads", "choose one of 1, 2, 4"],
    ),
    "no rank left": (
        ["mesh.mode=split", "trainer.dp_shard=2", "generator.tp=2"], 2,
        ["trainer.dp_shard=2: the trainer takes 2 of 2 ranks", "start 4 processes"],
    ),
    "layout too big": (
        ["trainer.dp_shard=4"], 2,
        ["trainer.dp_shard=4: makes 4 ranks, but the trainer has 2", "trainer.dp_shard=2"],
    ),
    "split alone": (["mesh.mode=split"], 1, ["mesh.mode=split: a world of 1", "start e.g. 2"]),
    "a key of W&B": (
        ["log.wandb_api_key=0123abcd"], 2,
        ["log.wandb_api_key=(not shown): unknown key", "--help lists all keys"],
    ),
    "no such model": (["model.path=/nope"], 2, ["model.path=/nope: no such directory", "name a"]),
    "not shipped": (["model.path=package:x"], 2, ["model.path=package:x: no such directory"]),
    "no such size": (
        ["model.path=null", "model.init=random", "model.flavor=tinny"], 2,
        ["model.flavor=tinny", "choose one of tiny, 0.6B"],
    ),
    "no weights": (
        ["model.path=null"], 2, ["model.path is not set: there are no", "model.init=random"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_problem_names_key_value_and_remedy(refusal, case):
    words, world_size, parts = CASES[case]
    message = refusal(*words, world_size=world_size)
    assert message.startswith("1 problem with the configuration:\n- ")
    for part in parts:
        assert part in message
    assert len(lines(message)) == 1


def test_prompts_that_are_too_long_are_counted_where_they_are(refusal):
    held_out, first = lines(refusal("model.max_length=12", "generator.max_new_tokens=8"))
    for line, total in ((held_out, "256 held-out prompts"), (first, "64 prompts of step 1")):
        assert line.startswith("model.max_length=12: the prompt '")
        assert "has 6 tokens, which with generator.max_new_tokens=8 is longer than the" in line
        assert f" of {total}); use at least 14, " in line
    assert held_out.endswith("or shorter prompts") and first.endswith("or overlong=skip")


def test_unknown_config_names_the_nearest(refusal):
    (line,) = lines(refusal(conf="qwen3_tny"))
    assert line.startswith("conf=qwen3_tny: no such config; did you mean qwen3_tiny?")


def test_unknown_task_and_task_key_name_the_nearest(refusal):
    assert "did you mean spell_backward?" in refusal("task=spell_backwards")
    assert "did you mean task_args.max_length?" in refusal("task_args.maxlength=4")
    far = refusal("task=zebra_xyz", "task_args.colour=red")
    assert "did you mean" not in far and "no such task; use one of spell_backward" in far
    assert "task=nowhere:Chess: cannot import nowhere" in refusal("task=nowhere:Chess")


def test_several_problems_are_listed_together(refusal):
    message = refusal("model.path=/nope", "num_prompts=63", "trainer.clip_norm=inf")
    assert "clip_norm" in message  # a range is refused as soon as it is read
    found = lines(refusal("model.path=/nope", "num_prompts=63", "generator.kv_tokens=16"))
    assert [line.partition("=")[0] for line in found] == [
        "generator.kv_tokens", "model.path", "num_prompts",
    ]  # fmt: skip


def test_tokenizer_task_weights_and_layout_are_in_the_same_list(refusal, model):
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    rewrite(model, lambda weights: weights.pop("model.norm.weight"))
    words = [f"model.path={model}", "task_args.maxlength=4", "task_args.minlength=2"]
    found = lines(refusal(*words, "num_prompts=63"))
    starts = [
        f"{model}/tokenizer.json is not a tokenizer",
        "task_args.maxlength=4",
        "task_args.minlength=2",
        f"model.path={model}: the safetensors files lack model.norm.weight",
        "num_prompts=63",
    ]
    assert len(found) == len(starts)
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_of_a_checkpoint_is_named(refusal, model, name):
    (model / name).unlink()
    (line,) = lines(refusal(f"model.path={model}"))
    assert line.startswith(f"model.path={model}: ") and name in line and "copy it" in line


def test_truncated_weights_are_found_before_anything_is_loaded(refusal, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (line,) = lines(refusal(f"model.path={model}"))
    assert line.startswith(f"model.path={model}: model.safetensors has ")


@pytest.mark.parametrize(
    "content, wrong",
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json is not a JSON object"),
        ("[" * 10_000, "config.json is not JSON"),
        (
            '{"model_type": "gemma3"}',
            "model_type 'gemma3' is not supported; use one of the dense decoders with plain, "
            "linear or llama3 RoPE: qwen3 (dense Qwen3), qwen2 (Qwen2, Qwen2.5), llama (Llama 2 ",
        ),
    ],
)
def test_config_json_that_describes_none_of_our_families(refusal, model, content, wrong):
    (model / "config.json").write_text(content)
    (line,) = lines(refusal(f"model.path={model}"))
    assert line.startswith(f"model.path={model}: {wrong}")


def test_what_config_json_says_of_another_model_is_refused_with_the_way_out(refusal, model):
    edit(model, quantization_config={"quant_method": "fp8"}, final_logit_softcapping=30.0)
    (line,) = lines(refusal(f"model.path={model}"))
    assert "final_logit_softcapping=30.0" in line and "use the unquantised weights" in line
    names = "model.ignore_config=[quantization_config,final_logit_softcapping]"
    assert line.endswith(f"set {names}")
    (other,) = lines(refusal(f"model.path={model}", names, "num_prompts=63"))
    assert other.startswith("num_prompts=63")


def test_a_base_of_rope_that_does_not_count_is_warned_about_once(process, model, capsys):
    edit(model, rope_theta=5.0, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    conf = load_conf(["conf=qwen3_tiny", f"model.path={model}"])[1]
    plan = check(conf, replace(process, world_size=2))
    assert plan.shape.rope_theta == 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"warning: model.path={model}: rope_theta=5.0 in config.json does not count beside "
        "rope_parameters.rope_theta=1000000.0, as in transformers; remove the wrong one"
    ]
    check(conf, replace(process, world_size=2, rank=1))
    assert capsys.readouterr().out == ""


def test_config_json_without_a_size(refusal, model):
    edit(model, hidden_size=None, intermediate_size=None)
    (line,) = lines(refusal(f"model.path={model}"))
    assert "config.json lacks hidden_size, intermediate_size; copy it again" in line


def test_a_directory_that_wants_its_own_code_is_refused(refusal, model):
    own = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit(model, auto_map=own, model_type="mine")
    (model / "modeling_mine.py").write_text("raise SystemExit('was run')\n")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    found = lines(refusal(f"model.path={model}"))
    config, of_tokenizer = (line for line in found if "asks for custom code" in line)
    assert config.startswith(f"model.path={model}: config.json asks for custom code (auto_map: ")
    assert "modeling_mine.MineForCausalLM" in config
    assert "tokenizer_config.json asks for custom code" in of_tokenizer and "Mine" in of_tokenizer
    assert all("code that ships with a model is never run" in x for x in (config, of_tokenizer))
    assert any("model_type 'mine' is not supported" in line for line in found)
    of_both = lines(refusal(f"model.tokenizer={model}"))
    assert [line.partition(" asks for custom code")[0] for line in of_both] == [
        f"model.tokenizer={model}: {name}" for name in ("config.json", "tokenizer_config.json")
    ]


def test_vocabulary_of_another_model(refusal, model):
    edit(model, vocab_size=64)
    (line,) = lines(refusal(f"model.path={model}", "model.init=random"))
    assert "its ids go up to 97, the model's vocabulary up to 63" in line
    assert "use the model's own tokenizer" in line


def test_weights_that_are_missing_from_the_file_are_named(refusal, model):
    rewrite(model, lambda weights: weights.pop("model.norm.weight"))
    (line,) = lines(refusal(f"model.path={model}"))
    assert line.startswith(
        f"model.path={model}: the safetensors files lack model.norm.weight; copy it from"
    )
    rewrite(model, lambda weights: [weights.pop(name) for name in sorted(weights)[:9]])
    (line,) = lines(refusal(f"model.path={model}"))
    assert "lack model.embed_tokens.weight, " in line and " and 6 more; " in line
    assert "config.json" not in line


def test_weights_of_other_sizes_are_named(refusal, model):
    edit(model, vocab_size=256)
    (line,) = lines(refusal(f"model.path={model}"))
    assert (
        "shapes that do not match config.json: model.embed_tokens.weight [128, 128] instead of "
        "[256, 128]; copy it from"
    ) in line
