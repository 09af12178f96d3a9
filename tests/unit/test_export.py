"""What an export keeps of the directory that a run started from, and the dtype of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_tokenizer import CHATML, END_OF_TEXT, IM_END
from model_sources import FAMILIES, GENERATION, TOOL_USE, exported, planned, source
from safetensors.torch import load_file, save_file
from tiny_qwen3 import MAX_LENGTH, load_role, random_sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

from mesh.model.families import shape_of_directory
from mesh.model.hf import export
from mesh.model.layouts import role_layouts
from mesh.model.policy import named_weights
from mesh.text.template import TEMPLATE_FOLDER
from mesh.types import ModelShape
from mesh.weights.digest import local_digests, total_digest


def entries_of(path: Path, name: str = "config.json") -> dict:
    return json.loads((path / name).read_text())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_all_that_its_source_has(tmp_path, solo_mesh, family):
    theirs = source(tmp_path / "theirs", family=family)
    ours = exported(theirs, tmp_path / "ours", solo_mesh)
    ends = {"eos_token_id": [IM_END, END_OF_TEXT, 1]}
    assert entries_of(ours) == entries_of(theirs) | ends
    assert entries_of(ours, "generation_config.json") == GENERATION | ends
    relative = {file.relative_to(theirs) for file in theirs.rglob("*")}
    assert relative == {file.relative_to(ours) for file in ours.rglob("*")}
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in [*copied, f"{TEMPLATE_FOLDER}/tool_use.jinja"]:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    before, after = (load_file(path / "model.safetensors") for path in (theirs, ours))
    assert ("model.layers.0.self_attn.q_proj.bias" in after) == (family == "qwen2")
    assert before.keys() == after.keys()
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, after[n]) for n, x in before.items())
    model, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    original = AutoModelForCausalLM.from_pretrained(theirs)
    assert model.dtype == original.dtype == torch.bfloat16
    tokens = torch.tensor(random_sequences([MAX_LENGTH]))
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert AutoTokenizer.from_pretrained(ours).chat_template == {
        "default": CHATML, "tool_use": TOOL_USE,
    }  # fmt: skip


@torch.no_grad()
def test_what_was_ignored_is_not_exported(tmp_path, solo_mesh):
    """Else `transformers` would scale RoPE, or look for a quantiser, where the run did not."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 3e4}
    theirs = source(tmp_path / "theirs", rope_scaling=yarn, quantization_config={"bits": 4})
    word = "model.ignore_config=[rope_scaling,quantization_config]"
    shape, plan = planned(theirs, word)
    plain, ours = source(tmp_path / "plain"), tmp_path / "ours"
    export(ours, named_weights(load_role(plain, solo_mesh)[0]), shape, plan, write=True)
    kept = entries_of(ours)
    assert "rope_scaling" not in kept and "quantization_config" not in kept
    assert kept["rope_theta"] == 3e4 and shape_of_directory(ours) == shape
    model = AutoModelForCausalLM.from_pretrained(ours)
    expected = AutoModelForCausalLM.from_pretrained(plain)  # of the same base, without scaling
    tokens = torch.tensor(random_sequences([40]))
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(
    ("dtype", "words", "expected"),
    [
        (torch.bfloat16, [], "bfloat16"),
        (torch.float32, [], "float32"),
        (torch.float16, [], "float32"),  # bfloat16 would round it
        (torch.bfloat16, ["export.dtype=float32"], "float32"),
        (torch.float32, ["export.dtype=bfloat16"], "bfloat16"),
        (torch.bfloat16, ["model.init=random"], "float32"),
        (torch.bfloat16, ["model.init=random", "export.dtype=bfloat16"], "bfloat16"),
    ],
)
def test_the_dtype_is_that_of_the_sources_weights_unless_set(tmp_path, dtype, words, expected):
    _, plan = planned(source(tmp_path, dtype), *words)
    assert (plan.dtype, plan.config["torch_dtype"]) == (getattr(torch, expected), expected)


def test_weights_of_two_dtypes_are_exported_in_the_one_that_holds_both(tmp_path):
    file = source(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, file)
    assert planned(tmp_path)[1].dtype == torch.float32


def digest(weights: dict[str, torch.Tensor], shape: ModelShape) -> str:
    layouts = role_layouts(shape, 8, torch.zeros(1, 1, 1, dtype=torch.int64), fsdp=False)
    mine = [layout for layout in layouts if layout.name in weights]
    return total_digest(mine, [local_digests(weights, mine, 0)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp32_weights_come_back_equal_or_rounded(tmp_path, solo_mesh, dtype):
    theirs = source(tmp_path / "theirs", torch.float32)
    model, shape = load_role(theirs, solo_mesh)
    before = {name: x.detach() for name, x in named_weights(model).items()}
    ours = exported(theirs, tmp_path / "ours", solo_mesh, f"export.dtype={dtype}")
    after = {n: x.detach() for n, x in named_weights(load_role(ours, solo_mesh)[0]).items()}
    assert (digest(after, shape) == digest(before, shape)) == (dtype == "float32")
    for name, weight in before.items():
        assert torch.equal(after[name], weight.to(getattr(torch, dtype)).float()), name


def test_a_tokenizer_file_that_is_gone_at_the_end_is_named(tmp_path, solo_mesh):
    """A model without it would be another model, and nothing would show it."""
    theirs = source(tmp_path / "theirs")
    shape, plan = planned(theirs)
    (theirs / "chat_template.jinja").unlink()
    weights = named_weights(load_role(theirs, solo_mesh)[0])
    with pytest.raises(FileNotFoundError, match="chat_template.jinja"):
        export(tmp_path / "ours", weights, shape, plan, write=True)


def test_templates_of_an_older_model_are_replaced(tmp_path, solo_mesh):
    theirs, ours = source(tmp_path / "theirs"), source(tmp_path / "ours")
    (ours / TEMPLATE_FOLDER / "rag.jinja").write_text("old")
    (ours / TEMPLATE_FOLDER / "tool_use.jinja").write_text("old")
    (ours / TEMPLATE_FOLDER / "notes.txt").write_text("mine")
    exported(theirs, ours, solo_mesh)
    found = {file.name: file.read_text() for file in (ours / TEMPLATE_FOLDER).iterdir()}
    assert found == {"tool_use.jinja": TOOL_USE, "notes.txt": "mine"}
    assert not ours.with_name("ours.partial").exists()
