"""The entries of RoPE in a `config.json`: its base, and how its frequencies are stretched.

They come in two forms: `rope_theta` with an optional dict `rope_scaling`, or one dict
`rope_parameters`. Both are read as `transformers` 5 reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mesh.types import RopeScaling

Entries = Mapping[str, Any]

ROPE_DICTS = ("rope_scaling", "rope_parameters")
"""Where `transformers` looks for the parameters of RoPE; the first that is not empty counts."""

FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""The kinds of RoPE that run (`rope_type`), and the numbers each asks for."""

ORIGINAL = "original_max_position_embeddings"
MAX_POSITIONS = "max_position_embeddings"


def rope_theta(entries: Entries) -> Any:
    """The base of RoPE as `transformers` 5 finds it, not yet checked: that of the first of
    ROPE_DICTS which is not empty, else that of the top level, else 1e4.

    Source: `convert_rope_params_to_dict` in transformers/modeling_rope_utils.py.
    """
    ropes = [entries[name] for name in ROPE_DICTS if entries.get(name)]
    if ropes and isinstance(ropes[0], dict) and "rope_theta" in ropes[0]:
        return ropes[0]["rope_theta"]
    return entries.get("rope_theta", 1e4)


def rope_scaling(entries: Entries) -> RopeScaling | None:
    """The scaling of entries that `unsupported_ropes` passes; None: plain RoPE."""
    ropes = [entries[name] for name in ROPE_DICTS if entries.get(name)]
    return _scaling(ropes[0], entries) if ropes else None


def _scaling(rope: Entries, entries: Entries) -> RopeScaling | None:
    kind = _kind(rope)
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        factor, low, high = (float(rope[name]) for name in FACTORS["llama3"])
        original = rope.get(ORIGINAL, entries[MAX_POSITIONS])
        return RopeScaling("llama3", factor, low, high, original)
    return None


def unsupported_ropes(entries: Entries) -> dict[str, Any]:
    """Dicts of RoPE that describe another function than ours, by name."""
    found = {name: entries[name] for name in ROPE_DICTS if entries.get(name)}
    return {name: rope for name, rope in found.items() if not _is_ours(rope)}


def _kind(rope: Entries) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _is_ours(rope: Any) -> bool:
    """True for one of the kinds in FACTORS that has its numbers, and no other parameter."""
    kind = _kind(rope) if isinstance(rope, dict) else None
    if not isinstance(kind, str) or kind not in FACTORS:
        return False
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *FACTORS[kind]}
    if kind == "llama3":
        known.add(ORIGINAL)
    whole = rope.get("partial_rotary_factor", 1) == 1
    others = [name for name, value in rope.items() if name not in known and value is not None]
    return whole and not others and _has_numbers(rope, kind)


def _has_numbers(rope: Entries, kind: str) -> bool:
    values: list[Any] = [rope.get(name) for name in FACTORS[kind]]
    if not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
        return False
    original = rope.get(ORIGINAL, 1)
    ordered = kind != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"]
    return ordered and type(original) is int and original > 0


def written_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The entry `rope_scaling` of a config.json, which every version of `transformers` reads."""
    if scaling is None:
        return {}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope[ORIGINAL] = scaling.original_positions
    return {"rope_scaling": rope}


def contradictions(entries: Entries) -> list[str]:
    """Two dicts of RoPE that give different bases or kinds."""
    ropes = [entries[name] for name in ROPE_DICTS if isinstance(entries.get(name), dict)]
    ropes = [rope for rope in ropes if rope]
    if len(ropes) < 2:
        return []
    top = entries.get("rope_theta", 1e4)
    found = []
    for what, values in (
        ("bases", [rope.get("rope_theta", top) for rope in ropes]),
        ("kinds", [_kind(rope) for rope in ropes]),
    ):
        if values[0] != values[1]:
            both = " and ".join(f"{name} ({x})" for name, x in zip(ROPE_DICTS, values, strict=True))
            found.append(f"{both} in config.json give RoPE different {what}; remove the wrong one")
    return found


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
