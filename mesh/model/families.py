"""Model families: from a `config.json` or a flavor's name to a `ModelShape`.

A family is read from `model_type`, becomes a shape, and is written back by `config_entries`;
torchtitan's state-dict adapter maps its weights to Hugging Face's names. One so far: dense Qwen3.
"""

from __future__ import annotations

import json
from pathlib import Path

from torchtitan.models.qwen3 import qwen3_configs
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

from mesh.model.policy import model_config
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


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def shape_of_directory(path: Path) -> ModelShape:
    """Shape described by a Hugging Face `config.json`.

    Raises ValueError naming the entry that is missing or not supported: another architecture,
    biases, scaled RoPE, sliding windows. Optional entries have `transformers`' defaults.
    """
    entries = json.loads((path / "config.json").read_text())
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"model.path={path}: config.json is empty or not a JSON object; copy it again"
        )
    if entries.get("model_type") != "qwen3":
        raise ValueError(
            f"model.path={path}: model_type {entries.get('model_type')!r} is not supported; "
            "use a dense Qwen3 checkpoint (model_type qwen3)"
        )
    rope = entries.get("rope_parameters") or {}
    scaling = entries.get("rope_scaling") or {k: v for k, v in rope.items() if k == "rope_type"}
    refused = {
        "attention_bias": entries.get("attention_bias"),
        "hidden_act": entries.get("hidden_act", "silu") != "silu",
        "use_sliding_window": entries.get("use_sliding_window"),
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
    }
    for name, value in refused.items():
        if value:
            raise ValueError(
                f"model.path={path}: {name} in config.json is not supported; use a dense Qwen3 "
                "checkpoint without it"
            )
    missing = [name for name in SIZES if name not in entries]
    if missing:
        raise ValueError(
            f"model.path={path}: config.json lacks {', '.join(missing)}; copy it again"
        )
    return ModelShape(
        vocab_size=entries["vocab_size"],
        dim=entries["hidden_size"],
        num_layers=entries["num_hidden_layers"],
        num_heads=entries["num_attention_heads"],
        num_kv_heads=entries["num_key_value_heads"],
        head_dim=entries.get("head_dim") or 128,
        ffn_dim=entries["intermediate_size"],
        rope_theta=float(entries.get("rope_theta") or rope.get("rope_theta") or 1e4),
        norm_eps=entries.get("rms_norm_eps", 1e-6),
        tied=entries.get("tie_word_embeddings", False),
        max_positions=entries.get("max_position_embeddings") or 32768,
    )


def config_entries(shape: ModelShape, eos_ids: tuple[int, ...]) -> dict[str, object]:
    """The `config.json` with which `transformers` builds a model of this shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
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
        "attention_bias": False,
        "eos_token_id": list(eos_ids) if len(eos_ids) != 1 else eos_ids[0],
        "dtype": "float32",
    }


def adapter(shape: ModelShape) -> Qwen3StateDictAdapter:
    """torchtitan's mapping between its parameter names and Hugging Face's."""
    return Qwen3StateDictAdapter(model_config(shape, 1), None)
