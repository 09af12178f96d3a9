"""Model families: from a `config.json` or a flavor's name to a `ModelShape`, and back.

A family is what its `model_type` means (`FAMILIES` in `config_entries.py`). It is configuration:
one model is built from every shape, and one table maps its weights to Hugging Face's names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torchtitan.models.qwen3 import qwen3_configs

from mesh.lifecycle.json_files import read_object
from mesh.model.config_entries import (
    FAMILIES,
    QUANTISED,
    SUPPORTED,
    Family,
    filled,
    head_dim,
    malformed,
    max_positions,
    shown,
    unsupported,
    without,
)
from mesh.model.policy import Policy, model_config, named_weights
from mesh.model.rope_entries import (
    contradictions,
    rope_scaling,
    rope_theta,
    stale,
    written_scaling,
)
from mesh.types import ModelShape

TINY = ModelShape(
    vocab_size=128,
    dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    ffn_dim=384,
    max_positions=4096,
)


def flavors() -> list[str]:
    """Sizes that `model.flavor` accepts: ours, and torchtitan's dense ones."""
    return ["tiny", *(name for name in qwen3_configs if name[0].isdigit() and "-A" not in name)]


def shape_of_flavor(flavor: str) -> ModelShape:
    """Shape of a named size. Raises ValueError for an unknown one."""
    if flavor == "tiny":
        return TINY
    if flavor not in flavors():
        raise ValueError(f"model.flavor={flavor} is unknown; choose one of {', '.join(flavors())}")
    config = qwen3_configs[flavor]("varlen")
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    return ModelShape(
        vocab_size=config.vocab_size,
        dim=config.dim,
        num_layers=len(config.layers),
        num_heads=attention.n_heads,
        num_kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        ffn_dim=feed_forward.w1.out_features,
        rope_theta=attention.rope.theta,
        norm_eps=config.norm.eps,
        tied=config.enable_weight_tying,
        max_positions=attention.rope.max_seq_len,
    )


def shape_of_directory(
    path: Path, ignored: Collection[str] = (), role: str = "model"
) -> ModelShape:
    """Shape described by a Hugging Face `config.json`.

    ignored: entries that are read as if they were not there (model.ignore_config); role: whose
    keys a message names. Raises
    ValueError, a line per problem, naming the entries that are missing or not supported. Optional
    entries have `transformers`' defaults.
    """
    try:
        entries = read_object(path / "config.json")
    except ValueError as error:
        raise ValueError(f"{role}.path={path}: {error}; copy it again") from error
    model_type = entries.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(
            f"{role}.path={path}: model_type {model_type!r} is not supported; "
            f"use one of the {SUPPORTED}"
        )
    entries = filled(without(entries, ignored), family)
    wrong = [f"{line}; copy it again, or correct it" for line in malformed(entries, family)]
    if not wrong:
        wrong = [*contradictions(entries), *refusals(entries, family, role)]
    if wrong:
        raise ValueError("\n".join(f"{role}.path={path}: {line}" for line in wrong))
    heads, pad = entries["num_attention_heads"], entries["pad_token_id"]
    return ModelShape(
        vocab_size=entries["vocab_size"],
        dim=entries["hidden_size"],
        num_layers=entries["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=entries["num_key_value_heads"] or heads,
        head_dim=head_dim(entries),
        ffn_dim=entries["intermediate_size"],
        rope_theta=float(rope_theta(entries)),
        norm_eps=entries["rms_norm_eps"],
        tied=entries["tie_word_embeddings"],
        max_positions=max_positions(entries, family),
        pad_id=None if pad is None else pad % entries["vocab_size"],
        family=str(model_type),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        rope_scaling=rope_scaling(entries),
    )


def refusals(entries: Mapping[str, Any], family: Family, role: str = "model") -> list[str]:
    """Entries of another function than the family's, and how to have them ignored."""
    found = unsupported(entries, family)
    if not found:
        return []
    listed = ", ".join(f"{name}={shown(value)}" for name, value in found.items())
    names = ",".join(found)
    quantised = any(name in QUANTISED for name in found)
    use = "the unquantised weights" if quantised else f"one of the {SUPPORTED}"
    return [
        f"config.json has what this program does not implement: {listed}; use {use}; or, if the "
        f"model is the same without them, set {role}.ignore_config=[{names}]"
    ]


def directory_warnings(path: Path, ignored: Collection[str] = ()) -> list[str]:
    """What in a directory that `shape_of_directory` takes does not mean what it seems to."""
    entries = without(read_object(path / "config.json"), ignored)
    return [f"model.path={path}: {line}" for line in stale(entries)]


def config_entries(shape: ModelShape, eos_ids: tuple[int, ...]) -> dict[str, object]:
    """The `config.json` with which `transformers` builds a model of this shape."""
    family = FAMILIES[shape.family]
    pad = {"pad_token_id": shape.pad_id}
    return {
        "architectures": [family.architecture],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        **family.written,
        **written_scaling(shape.rope_scaling),
        "eos_token_id": list(eos_ids) if len(eos_ids) != 1 else eos_ids[0],
        "dtype": "float32",
    } | (pad if shape.pad_id != family.defaults["pad_token_id"] else {})


HF_MODULES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.qkv_linear.wq": "self_attn.q_proj",
    "attention.qkv_linear.wk": "self_attn.k_proj",
    "attention.qkv_linear.wv": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
"""Hugging Face's module for each of torchtitan's, in every family; those of a layer without its
prefix."""


def hf_names(names: Iterable[str], shape: ModelShape) -> dict[str, str]:
    """Hugging Face's name of every weight, by torchtitan's. A tied head maps to the embedding."""
    theirs = {name: _hf_name(name) for name in names}
    if shape.tied:
        theirs["lm_head.weight"] = theirs["tok_embeddings.weight"]
    return theirs


def _hf_name(name: str) -> str:
    """layers.3.attention.wo.weight -> model.layers.3.self_attn.o_proj.weight"""
    module, _, parameter = name.rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if layer is None:
        return f"{HF_MODULES[module]}.{parameter}"
    return f"model.layers.{layer[1]}.{HF_MODULES[layer[2]]}.{parameter}"


def global_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Global shape of every weight, by torchtitan's names."""
    with torch.device("meta"):
        weights = named_weights(Policy(model_config(shape, 1)))
    return {name: tuple(weight.shape) for name, weight in weights.items()}
