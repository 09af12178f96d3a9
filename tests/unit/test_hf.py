"""Hugging Face directories: what we write `transformers` reads, and what we cannot run is named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from chat_tokenizer import CHATML, END_OF_TEXT, IM_END, saved
from safetensors.torch import load_file, save_file
from tiny_qwen3 import MAX_LENGTH, Variant, load_role, packed, random_sequences, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from mesh.config.schema import PACKAGE_DATA
from mesh.model import hf
from mesh.model.exported import planned_export, write_text_files
from mesh.model.families import TINY, config_entries, shape_of_directory, shape_of_flavor
from mesh.model.policy import named_weights
from mesh.model.safetensors_files import INDEX
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import ModelShape

TIED, UNTIED = Variant(0, tied=True, theta=1e4), Variant(1, tied=False, kv_heads=4)


@pytest.fixture(params=[TIED, UNTIED], ids=["tied", "untied"])
def checkpoint(request, tmp_path):
    """(directory, transformers' model of it)."""
    return tmp_path / "theirs", save_checkpoint(tmp_path / "theirs", request.param)


def export(path, model, shape, eos_ids=(1,), tokenizer=CHARACTERS):
    entries = config_entries(shape, eos_ids)
    plan = planned_export(entries, eos_ids, torch.float32, tokenizer)
    hf.export(path, named_weights(model), shape, plan, write=True)


def equal_files(path, other):
    ours, theirs = load_file(path), load_file(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@torch.no_grad()
def test_transformers_loads_what_we_export(checkpoint, tmp_path, solo_mesh):
    path, theirs = checkpoint
    model, shape = load_role(path, solo_mesh)
    ours = tmp_path / "ours"
    export(ours, model, shape)
    equal_files(ours / "model.safetensors", path / "model.safetensors")
    loaded, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.tie_word_embeddings == shape.tied
    assert loaded.config.eos_token_id == 1 and loaded.dtype == torch.float32
    tokens = torch.tensor(random_sequences([MAX_LENGTH]))
    assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)


def test_transformers_loads_the_tokenizer_we_export(tmp_path, solo_mesh):
    save_checkpoint(tmp_path / "theirs", TIED)
    model, shape = load_role(tmp_path / "theirs", solo_mesh)
    export(tmp_path / "ours", model, shape)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    original = AutoTokenizer.from_pretrained(CHARACTERS)
    assert tokenizer("hello 12")["input_ids"] == original("hello 12")["input_ids"]
    assert tokenizer.decode(tokenizer("hello 12")["input_ids"]) == "hello 12"


def test_several_end_tokens_are_written_as_a_list(tmp_path, solo_mesh):
    save_checkpoint(tmp_path / "theirs", TIED)
    model, shape = load_role(tmp_path / "theirs", solo_mesh)
    export(tmp_path / "ours", model, shape, eos_ids=(3, 7))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == [3, 7]


def test_the_shape_comes_back_from_our_config(tmp_path, solo_mesh):
    shape = ModelShape(
        96, 64, 3, 8, 2, 24, 80, rope_theta=3e4, norm_eps=1e-5, tied=False, max_positions=777
    )
    entries = config_entries(shape, (1,))
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert shape_of_directory(tmp_path) == shape


def test_the_models_own_context_and_generation_config_are_exported(tmp_path, solo_mesh):
    theirs = tmp_path / "theirs"
    save_checkpoint(theirs, TIED)
    (theirs / "generation_config.json").write_text('{"top_k": 20}')
    model, shape = load_role(theirs, solo_mesh)
    shape = dataclasses.replace(shape, max_positions=5 * MAX_LENGTH)
    export(tmp_path / "ours", model, shape, tokenizer=theirs)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["max_position_embeddings"] == 5 * MAX_LENGTH  # not what it was trained with
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert written == {"top_k": 20, "eos_token_id": 1}


def test_an_export_that_is_cut_leaves_no_model_behind(tmp_path, solo_mesh, monkeypatch):
    save_checkpoint(tmp_path / "theirs", TIED)
    model, shape = load_role(tmp_path / "theirs", solo_mesh)

    def cut(*_, **__):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(hf, "save_file", cut)
        export(tmp_path / "ours", model, shape)
    assert not (tmp_path / "ours").exists()
    export(tmp_path / "ours", model, shape)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ours", "theirs"]


def test_an_export_replaces_the_weights_of_a_directory_that_is_there(
    tmp_path, solo_mesh, monkeypatch
):
    """A sharded export over a single file: whatever is read, it is the new weights."""
    save_checkpoint(tmp_path, Variant(3))
    (tmp_path / "notes.txt").write_text("mine")
    save_checkpoint(tmp_path / "other", TIED)
    model, shape = load_role(tmp_path / "other", solo_mesh)
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    export(tmp_path, model, shape, tokenizer=CHARACTERS)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    again, _ = load_role(tmp_path, solo_mesh)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_an_export_leaves_nothing_of_an_older_model_behind(tmp_path, solo_mesh):
    """Every file of it changed what was read: ends, template, adapter, shards without an index."""
    save_checkpoint(tmp_path / "theirs", TIED)
    model, shape = load_role(tmp_path / "theirs", solo_mesh)
    old = saved(tmp_path / "old", CHATML, file=True, eos=[IM_END, END_OF_TEXT])
    (old / "adapter_config.json").write_text("{}")
    for name in ("model-00001-of-00002", "model-00002-of-00002", "adapter_model", "mine", "model"):
        save_file({"x": torch.zeros(1)}, old / f"{name}.safetensors")
    (old / "model.safetensors.index.json").write_text("{}")
    (old / "vocab.json").mkdir()  # of no model
    (old / "notes.txt").write_text("mine")
    export(old, model, shape)
    assert {file.name for file in old.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "mine.safetensors", "notes.txt", "vocab.json",
    }  # fmt: skip
    assert load_tokenizer(old).eos_ids == (1,)
    assert AutoTokenizer.from_pretrained(old).chat_template is None
    loaded = AutoModelForCausalLM.from_pretrained(old)
    assert loaded.generation_config.eos_token_id == 1
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_an_export_over_its_own_source_keeps_the_tokenizer(tmp_path, solo_mesh):
    theirs = saved(tmp_path, CHATML, file=True, eos=[IM_END, END_OF_TEXT])
    save_checkpoint(theirs, TIED)
    (theirs / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.6}')
    (theirs / "tokenizer.model").write_text("sentencepiece")
    model, shape = load_role(theirs, solo_mesh)
    ends = (IM_END, 1, END_OF_TEXT)
    export(theirs, model, shape, ends, tokenizer=theirs)
    assert load_tokenizer(theirs).eos_ids == ends
    assert (theirs / "chat_template.jinja").read_text() == CHATML
    assert (theirs / "tokenizer.model").read_text() == "sentencepiece"
    written = json.loads((theirs / "generation_config.json").read_text())
    assert written == {"eos_token_id": list(ends), "temperature": 0.6}


def test_the_generation_config_of_the_weights_goes_before_that_of_the_tokenizer(tmp_path):
    (model := tmp_path / "model").mkdir()
    (model / "generation_config.json").write_text('{"eos_token_id": 9, "top_k": 20}')
    tokenizer = saved(tmp_path / "tokenizer", eos=1)
    (tokenizer / "generation_config.json").write_text('{"top_k": 5, "top_p": 0.5}')
    (tmp_path / "ours").mkdir()
    plan = planned_export({}, (2, 9), torch.float32, tokenizer, start=model)
    write_text_files(tmp_path / "ours", plan)
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert written == {"top_k": 20, "top_p": 0.5, "eos_token_id": [2, 9]}


def test_shapes_of_sizes_and_of_the_shipped_checkpoint_name_their_context():
    assert shape_of_directory(PACKAGE_DATA / "qwen3_tiny") == TINY
    assert shape_of_flavor("0.6B").max_positions == 40960
    assert TINY.max_positions == 4096


def test_exports_in_shards_come_back(checkpoint, tmp_path, solo_mesh, monkeypatch):
    path, _ = checkpoint
    model, shape = load_role(path, solo_mesh)
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    ours = tmp_path / "ours"
    export(ours, model, shape)
    files = sorted(ours.glob("*.safetensors"))
    assert len(files) > 3 and not (ours / "model.safetensors").exists()
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    parts = [load_file(file) for file in files]
    for tensors in parts:
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 40_000
    assert sum(map(len, parts)) == len(load_file(path / "model.safetensors"))
    again, _ = load_role(ours, solo_mesh)
    for name, weight in named_weights(model).items():
        assert torch.equal(named_weights(again)[name], weight), name
    batch = packed(random_sequences([9]))
    theirs = AutoModelForCausalLM.from_pretrained(ours)(batch.tokens_T[None]).logits[0, :-1]
    expected_A = theirs.log_softmax(-1).gather(1, batch.targets_A[:, None])[:, 0]
    logprobs_A = batch.scores(again).logprobs_A
    torch.testing.assert_close(logprobs_A, expected_A, rtol=1e-5, atol=3e-5)


def test_sharded_checkpoints_of_transformers_load(tmp_path, solo_mesh):
    theirs = save_checkpoint(tmp_path, UNTIED, max_shard_size="100KB")
    assert (tmp_path / INDEX).exists()
    model, _ = load_role(tmp_path, solo_mesh)
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(model.layers["1"].attention.wo.weight, layer(theirs).o_proj.weight)


def layer(theirs):
    return theirs.model.layers[1].self_attn


WQ = "model.layers.1.self_attn.q_proj.weight"


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", [WQ, "model.norm.weight", "lm_head.weight"])
def test_a_missing_weight_is_named(tmp_path, solo_mesh, name):
    save_checkpoint(tmp_path, UNTIED)
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"the safetensors files lack {name};"):
        load_role(tmp_path, solo_mesh)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:-1], lambda x: torch.cat([x, x[:1]]), lambda x: x[:, :-1], lambda x: x.flatten()],
    ids=["a row less", "a row more", "a column less", "flat"],
)
def test_a_weight_of_another_shape_is_named(tmp_path, solo_mesh, change):
    save_checkpoint(tmp_path, UNTIED)
    rewrite(tmp_path, lambda t: t.update({WQ: change(t[WQ]).contiguous()}))
    sizes = rf"{WQ} \[[\d, ]+\] instead of \[96, 64\];"
    with pytest.raises(ValueError, match=f"shapes that do not match config.json: {sizes}"):
        load_role(tmp_path, solo_mesh)
