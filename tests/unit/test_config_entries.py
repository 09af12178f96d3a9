"""Entries of a `config.json`: those that `transformers` reads are read as it does, and those of
another model are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_qwen3 import Variant, load_role, packed, random_sequences, save_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from mesh.model.config_entries import FAMILIES, QUANTISED, unsupported
from mesh.model.families import config_entries, directory_warnings, shape_of_directory
from mesh.types import ModelShape

SHAPE = ModelShape(96, 64, 2, 4, 2, 16, 80)


def write(path, entries):
    (path / "config.json").write_text(json.dumps(config_entries(SHAPE, (1,)) | entries))


def problems_of(path, entries, ignored=()):
    write(path, entries)
    try:
        shape_of_directory(path, ignored)
    except ValueError as error:
        assert all(line.startswith(f"model.path={path}: ") for line in str(error).splitlines())
        return str(error)
    return ""


REFUSED = {  # what has no counterpart in our layers, by the entry that a message names
    "attention_bias": {"attention_bias": True},
    "attention_dropout": {"attention_dropout": 0.1},
    "hidden_act": {"hidden_act": "gelu"},
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": 4096},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    "is_causal": {"is_causal": False},
    "use_qk_norm": {"use_qk_norm": False},
    "qk_norm": {"qk_norm": False},
    "mlp_bias": {"mlp_bias": True},
    "architectures": {"architectures": ["Qwen3ForSequenceClassification"]},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "logits_scaling": {"logits_scaling": 8.0},
    "residual_multiplier": {"residual_multiplier": 0.22},
    "num_experts": {"num_experts": 8},
    "per_layer_config": {"per_layer_config": {"1": {"head_dim": 8}}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "quantization_config": {"quantization_config": {"quant_method": "fp8"}},
    "compression_config": {"compression_config": {"format": "float-quantized"}},
    "rope_scaling": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "rope_scaling old": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_scaling linear": {"rope_scaling": {"type": "linear"}},
    "rope_scaling other": {"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": True}},
    "rope_scaling llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope_scaling mrope": {"rope_scaling": {"type": "default", "mrope_section": [4, 2, 2]}},
    "rope_scaling text": {"rope_scaling": "dynamic"},
    "rope_parameters": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}},
    "rope_parameters layers": {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
    "rope_parameters partial": {"rope_parameters": {"partial_rotary_factor": 0.25}},
    "rope_parameters null": {"rope_parameters": {"rope_type": None}},
    "pad_token_id": {"pad_token_id": 96},
    "pad_token_id text": {"pad_token_id": "<pad>"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_entry_of_another_function_is_refused_by_name_unless_it_is_ignored(tmp_path, case):
    name, entries = case.split()[0], REFUSED[case]
    line = problems_of(tmp_path, entries)
    assert f" does not implement: {name}=" in line
    assert line.endswith(f"set model.ignore_config=[{name}]")
    assert ("use the unquantised weights" in line) == (name in QUANTISED)
    write(tmp_path, entries)
    assert shape_of_directory(tmp_path, [name]) == SHAPE


def test_all_that_is_refused_is_named_at_once(tmp_path):
    line = problems_of(tmp_path, {"mlp_bias": True, "logit_scale": 2.0})
    assert "mlp_bias=true, logit_scale=2.0" in line
    assert line.endswith("model.ignore_config=[mlp_bias,logit_scale]")
    assert "mlp_bias" not in problems_of(
        tmp_path, {"mlp_bias": True, "logit_scale": 2.0}, ignored=["mlp_bias"]
    )


def test_an_ignored_dict_of_rope_still_gives_its_base(tmp_path):
    write(tmp_path, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 3e5}})
    assert shape_of_directory(tmp_path, ["rope_scaling"]).rope_theta == 3e5


WITHOUT_EFFECT = {
    "transformers_version": "4.51.0",
    "_name_or_path": "somewhere",
    "torch_dtype": "bfloat16",
    "bos_token_id": 2,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_window_layers": 36,
    "sliding_window": None,
    "use_sliding_window": False,
    "use_cache": True,
    "rope_scaling": None,
    "layer_types": ["full_attention", "full_attention"],
    "temperature": 0.6,
    "top_k": 20,
    "pretraining_tp": 1,
    "quantization_config": None,
    "some_new_switch": False,
    "some_new_list": [],
}


def test_entries_without_effect_are_read_past(tmp_path):
    assert problems_of(tmp_path, WITHOUT_EFFECT) == ""
    assert shape_of_directory(tmp_path) == SHAPE


@pytest.mark.parametrize("version", ["all", "what differs from defaults"])
def test_all_entries_that_transformers_writes_are_known(version):
    config = Qwen3Config(**config_entries(SHAPE, (1,)))
    entries = config.to_dict() if version == "all" else config.to_diff_dict()
    assert len(entries) > 20 and unsupported(entries, FAMILIES["qwen3"]) == {}


MALFORMED = {
    "config.json lacks vocab_size": {"vocab_size": ...},
    "vocab_size='96' in config.json is not a positive integer": {"vocab_size": "96"},
    "hidden_size=0 ": {"hidden_size": 0},
    "num_hidden_layers=2.0 ": {"num_hidden_layers": 2.0},
    "num_attention_heads=None ": {"num_attention_heads": None},
    "num_key_value_heads=3 in config.json does not divide 4 heads": {"num_key_value_heads": 3},
    "head_dim=None ": {"head_dim": None},
    "head_dim=15 in config.json is odd": {"head_dim": 15},
    "max_position_embeddings=True ": {"max_position_embeddings": True},
    "rms_norm_eps=-1e-06 in config.json is not a positive number": {"rms_norm_eps": -1e-6},
    "rope_theta='1e6' ": {"rope_theta": "1e6"},
    "rope_theta=None ": {"rope_theta": None},
    "rope_theta=inf ": {"rope_theta": float("inf")},
    "tie_word_embeddings in config.json is neither true nor false": {"tie_word_embeddings": None},
    "model_type ['qwen3'] is not supported": {"model_type": ["qwen3"]},
}


@pytest.mark.parametrize("wrong", MALFORMED)
def test_an_entry_that_is_no_number_of_its_kind_is_named(tmp_path, wrong):
    entries = config_entries(SHAPE, (1,)) | MALFORMED[wrong]
    kept = {name: value for name, value in entries.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError) as error:
        shape_of_directory(tmp_path)
    assert str(error.value).startswith(f"model.path={tmp_path}: {wrong}")


def test_key_value_heads_that_are_null_are_as_many_as_heads(tmp_path):
    write(tmp_path, {"num_key_value_heads": None})
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert shape_of_directory(tmp_path).num_kv_heads == theirs.num_key_value_heads == 4


ROPES = {  # (the entries, the base)
    "none": ({}, 1e4),
    "top level": ({"rope_theta": 3e4}, 3e4),
    "in rope_parameters": ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4),
    "in rope_scaling": ({"rope_scaling": {"rope_theta": 3e4}}, 3e4),
    "in an old rope_scaling": ({"rope_scaling": {"type": "default", "rope_theta": 3e4}}, 3e4),
    "both, one stale": ({"rope_parameters": {"rope_theta": 3e4}, "rope_theta": 7.0}, 3e4),
    "rope_scaling, top stale": ({"rope_scaling": {"rope_theta": 3e4}, "rope_theta": 7.0}, 3e4),
    "without a base": ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e4}, 3e4),
    "an empty rope_scaling": ({"rope_parameters": {"rope_theta": 3e4}, "rope_scaling": {}}, 3e4),
    "a null beside": ({"rope_parameters": {"rope_theta": 3e4}, "rope_theta": None}, 3e4),
    "two alike": (
        {"rope_parameters": {"rope_theta": 3e4}, "rope_scaling": {"rope_theta": 3e4}},
        3e4,
    ),
    "a whole rotary part": ({"rope_theta": 3e4, "partial_rotary_factor": 1.0}, 3e4),
}


@pytest.mark.parametrize("case", ROPES)
@torch.no_grad()
def test_rope_is_that_of_transformers_whatever_form_its_base_has(tmp_path, solo_mesh, case):
    changes, theta = ROPES[case]
    save_checkpoint(tmp_path, Variant())
    file = tmp_path / "config.json"
    entries = json.loads(file.read_text())
    entries = {n: x for n, x in entries.items() if not n.startswith("rope_")} | changes
    file.write_text(json.dumps(entries))
    model, shape = load_role(tmp_path, solo_mesh)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert shape.rope_theta == theirs.config.rope_parameters["rope_theta"] == theta
    batch = packed(random_sequences([60]))
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.context)
    expected_TV = theirs(batch.tokens_T[None]).logits[0]
    torch.testing.assert_close(
        hidden_TD @ model.lm_head.weight.T, expected_TV, rtol=1e-5, atol=3e-5
    )
    warned = [line for line in directory_warnings(tmp_path) if "rope_theta=7.0 " in line]
    assert len(warned) == ("stale" in case) == len(directory_warnings(tmp_path))


def test_two_bases_of_rope_that_differ_are_refused(tmp_path):
    """`transformers` takes the one in rope_scaling, which is the older form."""
    both = {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}}
    assert "rope_scaling (20000.0) and rope_parameters (1000000.0)" in problems_of(
        tmp_path, both | {"rope_theta": 2e4}
    )


def test_entries_left_out_of_a_config_have_the_defaults_of_transformers(tmp_path):
    optional = ("rope_theta", "head_dim", "rms_norm_eps", "attention_bias", "tie_word_embeddings",
                "max_position_embeddings")  # fmt: skip
    kept = {name: x for name, x in config_entries(SHAPE, (1,)).items() if name not in optional}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    shape, theirs = shape_of_directory(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert shape.tied == theirs.tie_word_embeddings
    assert shape.head_dim == theirs.head_dim
    assert shape.norm_eps == theirs.rms_norm_eps
    assert shape.max_positions == theirs.max_position_embeddings
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert shape.pad_id is theirs.pad_token_id is None
