"""Every family against `transformers` on random checkpoints: logits, logprobs, gradients of biases,
the frequencies of RoPE, and what an entry that is left out of a `config.json` means."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_families import LLAMA3, VARIANTS
from tiny_qwen3 import MAX_LENGTH, Variant, load_role, packed, random_sequences, save_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mesh.model.config_entries import FAMILIES, filled, unsupported
from mesh.model.families import config_entries, hf_names, shape_of_directory
from mesh.model.policy import named_weights
from mesh.model.rope import inverse_frequencies
from mesh.types import ModelShape, RopeScaling


@pytest.mark.parametrize("case", VARIANTS)
@torch.no_grad()
def test_logits_and_logprobs_are_those_of_transformers(tmp_path, solo_mesh, case):
    variant = VARIANTS[case]
    theirs = save_checkpoint(tmp_path, variant)
    model, shape = load_role(tmp_path, solo_mesh)
    assert (shape.family, shape.tied) == (variant.family, variant.tied)
    lengths = [1, 2, 39, 41, MAX_LENGTH]
    for sequence in random_sequences(lengths, vocab_size=variant.vocab_size):
        batch = packed([sequence])
        hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.context)
        expected_TV = theirs(torch.tensor([sequence])).logits[0]
        assert expected_TV.std() > 0.5
        torch.testing.assert_close(
            hidden_TD @ model.lm_head.weight.T, expected_TV, rtol=1e-5, atol=3e-5
        )
        if len(sequence) == 1:
            continue
        logprobs_A = batch.scores(model).logprobs_A
        right_AV = expected_TV[:-1].log_softmax(-1)
        right_A = right_AV.gather(1, batch.targets_A[:, None])[:, 0]
        torch.testing.assert_close(logprobs_A, right_A, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("case", ["qwen2 untied", "llama 3"])
def test_gradients_of_every_weight_are_those_of_transformers(tmp_path, solo_mesh, case):
    """Biases too, and by the names of a directory."""
    theirs = save_checkpoint(tmp_path, VARIANTS[case]).train()
    model, _ = load_role(tmp_path, solo_mesh)
    (sequence,) = random_sequences([60])
    batch = packed([sequence])
    batch.scores(model).logprobs_A.sum().backward()
    right_AV = theirs(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
    right_AV.gather(1, batch.targets_A[:, None]).sum().backward()
    expected = {name: x.grad for name, x in theirs.named_parameters()}
    ours = named_weights(model)
    names = hf_names(ours, shape_of_directory(tmp_path))
    assert {*names.values()} == {*expected}
    for name, weight in ours.items():
        right = expected[names[name]]
        scale = right.abs().max().item()
        assert scale > 1e-3, name
        torch.testing.assert_close(weight.grad, right, rtol=0, atol=2e-5 * max(scale, 1))


@pytest.mark.parametrize("rope", [
    {"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, LLAMA3,
    LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("head_dim, theta", [(64, 5e5), (128, 5e5), (24, 1e4)])
def test_frequencies_have_the_bits_of_transformers(tmp_path, rope, head_dim, theta):
    config = AutoConfig.for_model(
        "llama", head_dim=head_dim, max_position_embeddings=131072,
        rope_parameters=rope | {"rope_theta": theta},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = shape_of_directory(tmp_path)
    ours = inverse_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)
    if rope["rope_type"] == "default":
        right, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        right, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    assert factor == 1.0 and torch.equal(ours, right)
    plain = inverse_frequencies(shape.head_dim, shape.rope_theta)
    assert torch.equal(ours, plain) == (rope["rope_type"] == "default")


SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32,
    "intermediate_size": 80,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_entries_that_are_left_out_have_the_familys_defaults_in_transformers(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": family}))
    shape, theirs = shape_of_directory(tmp_path), AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(theirs)
    names = {name for name, _ in model.named_parameters()}
    assert shape.num_kv_heads == theirs.num_key_value_heads
    assert shape.head_dim == model.model.layers[0].self_attn.head_dim
    assert shape.norm_eps == theirs.rms_norm_eps
    assert shape.tied == theirs.tie_word_embeddings
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert shape.rope_scaling is None and theirs.rope_parameters["rope_type"] == "default"
    assert shape.pad_id is theirs.pad_token_id is None
    assert shape.qk_norm == ("model.layers.0.self_attn.q_norm.weight" in names)
    assert shape.qkv_bias == ("model.layers.0.self_attn.k_proj.bias" in names)
    window = getattr(theirs, "sliding_window", None)
    longest = theirs.max_position_embeddings
    assert shape.max_positions == min(longest, longest if window is None else window)


SCALINGS = [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 32.0, 1.0, 4.0, 40)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_shape_comes_back_from_its_config_as_transformers_reads_it(tmp_path, family, scaling):
    shape = ModelShape(
        96, 64, 2, 4, 2, 24, 80, rope_theta=3e4, norm_eps=1e-5, tied=False, max_positions=777,
        pad_id=5, family=family, qk_norm=FAMILIES[family].qk_norm,
        qkv_bias=FAMILIES[family].qkv_bias, rope_scaling=scaling,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config_entries(shape, (1,))))
    assert shape_of_directory(tmp_path) == shape
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == family and theirs.rope_parameters["rope_theta"] == 3e4
    kind = "default" if scaling is None else scaling.kind
    assert theirs.rope_parameters["rope_type"] == kind
    assert getattr(theirs, "sliding_window", None) is None
    theirs.save_pretrained(tmp_path)  # in the form of today's transformers
    assert shape_of_directory(tmp_path) == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_all_entries_that_transformers_writes_are_known(family):
    """But for the window of Mistral, its default, which bounds the context instead."""
    config = AutoConfig.for_model(family)
    for entries in (config.to_dict(), config.to_diff_dict()):
        whole = filled(SIZES | entries, FAMILIES[family])
        assert len(whole) > 10 and unsupported(whole, FAMILIES[family]) == {}


REAL = {  # entries of published directories that are not the family's own
    "llama": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
              "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    "qwen2": {"use_mrope": False, "max_window_layers": 21, "sliding_window": 131072,
              "use_sliding_window": False, "attention_bias": True},
    "mistral": {"sliding_window": None},
}  # fmt: skip


@pytest.mark.parametrize("family", REAL)
def test_entries_of_published_models_without_effect_are_read_past(tmp_path, family):
    entries = SIZES | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(entries | {"sliding_window": None}))
    expected = shape_of_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(entries | REAL[family]))
    assert shape_of_directory(tmp_path) == expected


REFUSED = [  # (family, entries, what the message names)
    ("llama", {"attention_bias": True}, "attention_bias=true"),
    ("llama", {"mlp_bias": True}, "mlp_bias=true"),
    ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling="),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "rope_scaling="),
    ("llama", {"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "rope_scaling="),
    ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8.5}}, "rope_scal"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_parameters="),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": True}}, "rope_parameters="),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true"),
    ("qwen2", {"use_qk_norm": True}, "use_qk_norm=true"),
    ("qwen2", {"qkv_bias": False}, "qkv_bias=false"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config="),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2]}}, "rope_scaling="),
    ("mistral", {"attention_bias": True}, "attention_bias=true"),
    ("mistral", {"layer_types": ["sliding_attention"] * 2}, "layer_types="),
]  # fmt: skip


@pytest.mark.parametrize("family, entries, named", REFUSED, ids=str)
def test_another_function_is_refused_with_what_is_supported(tmp_path, family, entries, named):
    written = SIZES | {"model_type": family, "max_position_embeddings": 64} | entries
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError) as caught:
        shape_of_directory(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert f"does not implement: {named}" in line
    assert line.endswith(f"set model.ignore_config=[{next(iter(entries))}]")
    if "quantization_config" not in entries:
        supported = "; use one of the dense decoders with plain, linear or llama3 RoPE: "
        assert supported in line and "llama (Llama 2 and 3, SmolLM2, TinyLlama)" in line


MALFORMED = [  # (family, entries, what the message says)
    ("llama", {"head_dim": 0}, "head_dim=0 in config.json is not a positive integer"),
    ("llama", {"head_dim": 15}, "head_dim=15 in config.json is odd"),
    ("llama", {"hidden_size": 96}, "head_dim=3 in config.json is odd"),
    ("llama", {"hidden_size": 65}, "hidden_size=65 in config.json, without a head_dim, is no mul"),
    ("qwen2", {"num_attention_heads": 16}, "num_key_value_heads=32 in config.json does not div"),
    ("mistral", {"sliding_window": -1}, "sliding_window=-1 in config.json is not a positive int"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
               "rope_parameters": {"rope_type": "default"}},
     "rope_scaling (linear) and rope_parameters (default) in config.json give RoPE different kin"),
]  # fmt: skip


@pytest.mark.parametrize("family, entries, wrong", MALFORMED, ids=str)
def test_entries_that_make_no_model_are_named(tmp_path, family, entries, wrong):
    written = SIZES | {"model_type": family, "sliding_window": None} | entries
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError) as caught:
        shape_of_directory(tmp_path)
    assert str(caught.value).startswith(f"model.path={tmp_path}: {wrong}")


def test_a_window_of_mistral_bounds_the_context_unless_it_is_ignored(tmp_path):
    """Within the window attention sees every token, so that the model is ours up to there."""
    entries = SIZES | {"model_type": "mistral", "sliding_window": 48}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    shape = shape_of_directory(tmp_path)
    assert shape.max_positions == 48
    ignored = shape_of_directory(tmp_path, ["sliding_window"])
    assert ignored == replace(shape, max_positions=131072)


@torch.no_grad()
def test_within_its_window_mistral_is_the_model_without_one(tmp_path, solo_mesh):
    """And beyond it `transformers`' is another one, which a longer context would have to be."""
    theirs = save_checkpoint(
        tmp_path, Variant(5, family="mistral", tied=False, others={"sliding_window": 48})
    )
    model, shape = load_role(tmp_path, solo_mesh)
    (sequence,) = random_sequences([MAX_LENGTH])
    batch = packed([sequence])
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.context)
    difference_T = (
        (hidden_TD @ model.lm_head.weight.T - theirs(batch.tokens_T[None]).logits[0]).abs().amax(-1)
    )
    assert difference_T[: shape.max_positions].max() < 3e-5
    assert difference_T[shape.max_positions :].min() > 1e-3
