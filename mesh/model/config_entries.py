"""The entries of a `config.json`: which describe our model, and which none that we run.

An entry is read, or has to have the value that our layers implement, or has no effect on what a
text model computes. Every other one is refused by name: a config may describe another function with
the same sizes, and nothing else would show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Entries = Mapping[str, Any]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOT_COMPUTED = _names(
    """
    model_type transformers_version _name_or_path name_or_path _commit_hash auto_map dtype
    torch_dtype torchscript use_cache use_bfloat16 initializer_range pretraining_tp tokenizer_class
    prefix task_specific_params finetuning_task problem_type id2label label2id num_labels
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


@dataclass(frozen=True)
class Family:
    """The entries of a `model_type`. architecture: its only one; read: entries that become a
    ModelShape; fixed: that have one of these values; inert: without effect in this family.
    """

    architecture: str
    read: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]
    inert: frozenset[str]


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    read=_names(
        """
        vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        intermediate_size rms_norm_eps tie_word_embeddings max_position_embeddings
        rope_theta rope_parameters rope_scaling pad_token_id
        """
    ),
    fixed={
        "hidden_act": ("silu", "swish"),
        "is_causal": (True,),
        "use_qk_norm": (True,),
        "qk_norm": (True,),
        "partial_rotary_factor": (1,),
        **NO_DROPOUT,
    },
    # sliding windows are off unless use_sliding_window, which is refused, is true
    inert=frozenset({"sliding_window", "max_window_layers"}),
)

FAMILIES = {"qwen3": QWEN3}

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)

ROPE_DICTS = ("rope_scaling", "rope_parameters")
"""Where `transformers` looks for the parameters of RoPE; the first that is not empty counts."""


QUANTISED = ("quantization_config", "compression_config", "quantization")


def without(entries: Entries, ignored: Collection[str]) -> dict[str, Any]:
    """The entries but for the `ignored` ones (model.ignore_config). The base of RoPE still counts
    where a dict of RoPE is ignored: without it the model would be another one.
    """
    kept = {name: value for name, value in entries.items() if name not in ignored}
    for name in ROPE_DICTS:
        rope = entries.get(name)
        if name in ignored and isinstance(rope, dict) and "rope_theta" in rope:
            kept[name] = {"rope_theta": rope["rope_theta"]}
    return kept


def malformed(entries: Entries) -> list[str]:
    """Entries that a ModelShape needs and that are missing or no numbers of their kind."""
    missing = [name for name in SIZES if name not in entries]
    found = [f"config.json lacks {', '.join(missing)}"] if missing else []
    for name in (*SIZES, "head_dim", "max_position_embeddings"):
        value = entries.get(name, 1)
        optional = name == "num_key_value_heads" and value is None
        if not optional and (type(value) is not int or value < 1):
            found.append(f"{name}={value!r} in config.json is not a positive integer")
    for name, value in (
        ("rms_norm_eps", entries.get("rms_norm_eps", 1.0)),
        ("rope_theta", rope_theta(entries)),
    ):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            found.append(f"{name}={value!r} in config.json is not a positive number")
    if type(entries.get("tie_word_embeddings", False)) is not bool:
        found.append("tie_word_embeddings in config.json is neither true nor false")
    return found or _uneven(entries)


def _uneven(entries: Entries) -> list[str]:
    """Heads that do not divide as grouped queries and rotated pairs do."""
    heads, groups = entries["num_attention_heads"], entries["num_key_value_heads"]
    found = []
    if groups is not None and heads % groups:
        found.append(f"num_key_value_heads={groups} in config.json does not divide {heads} heads")
    if entries.get("head_dim", 128) % 2:
        found.append(f"head_dim={entries['head_dim']} in config.json is odd")
    return found


def unsupported(entries: Entries, family: Family) -> dict[str, Any]:
    """The entries that describe another function than the family's, by name, with their values."""
    found = {}
    for name, value in entries.items():
        if value is None or name in family.read | family.inert | NOT_COMPUTED:
            continue
        if name in family.fixed:
            supported = value in family.fixed[name]
        elif name == "architectures":
            supported = value == [family.architecture]
        elif name == "layer_types":
            supported = value == ["full_attention"] * entries["num_hidden_layers"]
        else:
            supported = value is False or value in ("", [], {})
        if not supported:
            found[name] = value
    for name in ROPE_DICTS:
        if entries.get(name) and not _is_plain_rope(entries[name]):
            found[name] = entries[name]
    pad = entries.get("pad_token_id")
    if pad is not None and not _is_row(pad, entries["vocab_size"]):
        found["pad_token_id"] = pad
    return found


def _is_plain_rope(rope: Any) -> bool:
    """True for parameters of RoPE that only name its base."""
    if not isinstance(rope, dict):
        return False
    names = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    whole = rope.get("partial_rotary_factor", 1) == 1
    return plain and whole and all(value is None for n, value in rope.items() if n not in names)


def _is_row(value: Any, vocab_size: int) -> bool:
    """True for a `padding_idx` that torch's Embedding takes: negative ones count from the end."""
    return type(value) is int and -vocab_size <= value < vocab_size


def rope_theta(entries: Entries) -> Any:
    """The base of RoPE as `transformers` 5 finds it, not yet checked: that of the first of
    ROPE_DICTS which is not empty, else that of the top level, else 1e4.

    Source: `convert_rope_params_to_dict` in transformers/modeling_rope_utils.py.
    """
    ropes = [entries[name] for name in ROPE_DICTS if entries.get(name)]
    if ropes and isinstance(ropes[0], dict) and "rope_theta" in ropes[0]:
        return ropes[0]["rope_theta"]
    return entries.get("rope_theta", 1e4)


def contradictions(entries: Entries) -> list[str]:
    """Two dicts of RoPE that give different bases."""
    ropes = [entries[name] for name in ROPE_DICTS if isinstance(entries.get(name), dict)]
    top = entries.get("rope_theta", 1e4)
    thetas = [rope.get("rope_theta", top) for rope in ropes if rope]
    if len(thetas) < 2 or thetas[0] == thetas[1]:
        return []
    both = " and ".join(f"{name} ({theta})" for name, theta in zip(ROPE_DICTS, thetas, strict=True))
    return [f"{both} in config.json give RoPE different bases; remove the wrong one"]


def stale(entries: Entries) -> list[str]:
    """A base of RoPE at the top level that does not count."""
    used, top = rope_theta(entries), entries.get("rope_theta")
    if top is None or top == used:
        return []
    where = next(name for name in ROPE_DICTS if entries.get(name))
    return [
        f"rope_theta={top} in config.json does not count beside {where}.rope_theta={used}, as in "
        "transformers; remove the wrong one"
    ]


def shown(value: Any) -> str:
    """The value of an entry, cut to what fits a line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
