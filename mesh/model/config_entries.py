"""The entries of a `config.json`: which describe our model, and which none that we run.

An entry is read, or has to have the value that our layers implement, or has no effect on what a
text model computes. Every other one is refused by name: a config may describe another function with
the same sizes, and nothing else would show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh.model.rope_entries import ROPE_DICTS, rope_theta, unsupported_ropes

Entries = Mapping[str, Any]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOT_COMPUTED = _names(
    """
    model_type transformers_version _name_or_path name_or_path _model_name_or_path _commit_hash
    transformers.js_config auto_map dtype torch_dtype torchscript use_cache use_bfloat16
    initializer_range pretraining_tp tokenizer_class prefix
    task_specific_params finetuning_task problem_type id2label label2id num_labels
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    chunk_size_feed_forward tie_last_hidden_states attn_implementation _attn_implementation
    _attn_implementation_autoset _experts_implementation unsloth_fixed unsloth_version
    bos_token_id eos_token_id sep_token_id unk_token_id decoder_start_token_id
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff
    eta_cutoff num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_lookbehind target_lookbehind
    """
)
"""Without effect on what the model computes: names, ids, precision on disk, defaults of outputs and
of `generate` (those that `transformers` moves to a GenerationConfig)."""

NO_DROPOUT = dict.fromkeys(
    ("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop"),
    (0,),
)


READ = _names(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size rms_norm_eps tie_word_embeddings max_position_embeddings
    rope_theta rope_parameters rope_scaling pad_token_id
    """
)
"""Entries that become a ModelShape, in every family."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "partial_rotary_factor": (1,),
    **NO_DROPOUT,
}


@dataclass(frozen=True)
class Family:
    """Meaning of a `model_type`. architecture: its only one; models: examples of it; qk_norm,
    qkv_bias: as in a ModelShape; defaults: those of `transformers` for entries that are left out
    (a head_dim of None: hidden_size / num_attention_heads); fixed: entries that have one of these
    values; inert: those without effect in this family; written: those that a config.json of it has
    beside the common ones; windowed: `sliding_window` bounds how far attention looks back.
    """

    architecture: str
    models: str
    qk_norm: bool
    qkv_bias: bool
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    written: Mapping[str, Any] = field(default_factory=dict)
    windowed: bool = False


WINDOWS = _names("sliding_window max_window_layers")
"""Without effect unless use_sliding_window, which is refused, is true."""


def _defaults(**of_family: Any) -> dict[str, Any]:
    common = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "pad_token_id": None}
    return common | of_family


FAMILIES = {
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        models="dense Qwen3",
        qk_norm=True,
        qkv_bias=False,
        defaults=_defaults(head_dim=128, num_key_value_heads=32, max_position_embeddings=32768),
        fixed={"use_qk_norm": (True,), "qk_norm": (True,)},
        inert=WINDOWS,
        written={"attention_bias": False},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        models="Qwen2, Qwen2.5",
        qk_norm=False,
        qkv_bias=True,
        defaults=_defaults(head_dim=None, num_key_value_heads=32, max_position_embeddings=32768),
        fixed={"qkv_bias": (True,)},
        inert=WINDOWS | {"attention_bias"},  # q, k and v have biases whatever it says
        written={"use_sliding_window": False},
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        models="Llama 2 and 3, SmolLM2, TinyLlama",
        qk_norm=False,
        qkv_bias=False,
        defaults=_defaults(head_dim=None, num_key_value_heads=None, max_position_embeddings=2048),
        inert=_names("is_llama_config"),
        written={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        models="Mistral",
        qk_norm=False,
        qkv_bias=False,
        defaults=_defaults(
            head_dim=None,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            sliding_window=4096,
        ),
        inert=frozenset({"sliding_window"}),  # read by `max_positions`
        written={"sliding_window": None},
        windowed=True,
    ),
}

SUPPORTED = "dense decoders with plain, linear or llama3 RoPE: " + ", ".join(
    f"{name} ({family.models})" for name, family in FAMILIES.items()
)
"""What runs, for the messages that refuse the rest."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)

QUANTISED = ("quantization_config", "compression_config", "quantization")


def without(entries: Entries, ignored: Collection[str]) -> dict[str, Any]:
    """The entries but for the `ignored` ones (model.ignore_config). The base of RoPE still counts
    where a dict of RoPE is ignored: without it the model would be another one. A window that is
    ignored is none, where the default is one.
    """
    kept = {name: value for name, value in entries.items() if name not in ignored}
    for name in ROPE_DICTS:
        rope = entries.get(name)
        if name in ignored and isinstance(rope, dict) and "rope_theta" in rope:
            kept[name] = {"rope_theta": rope["rope_theta"]}
    return kept | ({"sliding_window": None} if "sliding_window" in ignored else {})


def filled(entries: Entries, family: Family) -> dict[str, Any]:
    """The entries, and the family's defaults for those that are left out."""
    return {**family.defaults, **entries}


def malformed(entries: Entries, family: Family) -> list[str]:
    """Of `filled` entries, those that a ModelShape needs and that are missing or no numbers of
    their kind.
    """
    missing = [name for name in SIZES if name not in entries]
    found = [f"config.json lacks {', '.join(missing)}"] if missing else []
    windows = ["sliding_window"] if family.windowed else []
    none = [name for name, value in family.defaults.items() if value is None]
    none += ["num_key_value_heads", *windows]
    for name in (*SIZES, "head_dim", "max_position_embeddings", *windows):
        value = entries.get(name, 1)
        optional = name in none and value is None
        if not optional and (type(value) is not int or value < 1):
            found.append(f"{name}={value!r} in config.json is not a positive integer")
    for name, value in (
        ("rms_norm_eps", entries["rms_norm_eps"]),
        ("rope_theta", rope_theta(entries)),
    ):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            found.append(f"{name}={value!r} in config.json is not a positive number")
    if type(entries["tie_word_embeddings"]) is not bool:
        found.append("tie_word_embeddings in config.json is neither true nor false")
    return found or _uneven(entries)


def _uneven(entries: Entries) -> list[str]:
    """Heads that do not divide as grouped queries and rotated pairs do."""
    heads, groups = entries["num_attention_heads"], entries["num_key_value_heads"]
    found = []
    if groups is not None and heads % groups:
        found.append(f"num_key_value_heads={groups} in config.json does not divide {heads} heads")
    if entries["head_dim"] is None and entries["hidden_size"] % heads:
        size = entries["hidden_size"]
        found.append(
            f"hidden_size={size} in config.json, without a head_dim, is no multiple of "
            f"num_attention_heads={heads}"
        )
    elif head_dim(entries) % 2:
        found.append(f"head_dim={head_dim(entries)} in config.json is odd")
    return found


def head_dim(entries: Entries) -> int:
    """The size of a head: the entry, or an even share of hidden_size where it has none."""
    size: int | None = entries["head_dim"]
    share: int = entries["hidden_size"] // entries["num_attention_heads"]
    return share if size is None else size


def max_positions(entries: Entries, family: Family) -> int:
    """The longest context. Within a sliding window's size attention looks back at every token, so
    a model with windows is ours up to there.
    """
    longest: int = entries["max_position_embeddings"]
    window = entries["sliding_window"] if family.windowed else None
    return longest if window is None else min(longest, window)


def unsupported(entries: Entries, family: Family) -> dict[str, Any]:
    """The entries that describe another function than the family's, by name, with their values."""
    found = {}
    fixed = {**FIXED, **family.fixed}
    known = READ | family.inert | NOT_COMPUTED
    for name, value in entries.items():
        if value is None or name in known:
            continue
        if name in fixed:
            supported = value in fixed[name]
        elif name == "architectures":
            supported = value == [family.architecture]
        elif name == "layer_types":
            supported = value == ["full_attention"] * entries["num_hidden_layers"]
        else:
            supported = value is False or value in ("", [], {})
        if not supported:
            found[name] = value
    found |= unsupported_ropes(entries)
    pad = entries.get("pad_token_id")
    if pad is not None and not _is_row(pad, entries["vocab_size"]):
        found["pad_token_id"] = pad
    return found


def _is_row(value: Any, vocab_size: int) -> bool:
    """True for a `padding_idx` that torch's Embedding takes: negative ones count from the end."""
    return type(value) is int and -vocab_size <= value < vocab_size


def shown(value: Any) -> str:
    """The value of an entry, cut to what fits a line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
