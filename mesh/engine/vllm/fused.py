"""vllm.model=native: vLLM's own model of the family, whose linear layers are fused.

The trainer's weights are views of the fused ones, so that the weight bridge writes where vLLM
reads: a rank's rows of q, k and v follow one another, and so do those of gate and up. The modules
have the same names in all families that we run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers import utils

from mesh.types import ModelShape

WHOLE = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w2": "mlp.down_proj",
}
"""vLLM's module for each of the trainer's; names of a layer's modules without its number."""

FUSED = {
    "self_attn.qkv_proj": [f"attention.qkv_linear.{name}" for name in ("wq", "wk", "wv")],
    "mlp.gate_up_proj": ["feed_forward.w1", "feed_forward.w3"],
}
"""The trainer's modules whose rows a module of vLLM's holds, in this order."""


def unfused(
    model: nn.Module, shape: ModelShape, names: set[str], tp: int
) -> dict[str, torch.Tensor]:
    """Live weights of vLLM's model by the trainer's `names`: parameters, or rows of them.

    Raises RuntimeError if a forward pass would read copies of them.
    """
    refuse_copies(model)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    heads = (shape.num_heads // tp, shape.kv_heads_of_rank(tp))
    width, kv = (count * shape.head_dim for count in heads)
    rows = {"self_attn.qkv_proj": [width, kv, kv], "mlp.gate_up_proj": [shape.ffn_dim // tp] * 2}
    found = {}
    for (prefix, theirs_prefix), kind in product(_prefixes(shape), ("weight", "bias")):
        for ours, name in WHOLE.items():
            if f"{prefix}{ours}.{kind}" in names:
                found[f"{prefix}{ours}.{kind}"] = theirs[f"{theirs_prefix}{name}.{kind}"]
        for name, parts in FUSED.items():
            if f"{prefix}{parts[0]}.{kind}" in names:
                whole = theirs[f"{theirs_prefix}{name}.{kind}"]
                views = whole.detach().split(rows[name])
                found |= {f"{prefix}{p}.{kind}": v for p, v in zip(parts, views, strict=True)}
    assert found.keys() == names, f"vLLM's model has no place for {sorted(names - found.keys())}"
    return {name: tensor.detach() for name, tensor in found.items()}


def _prefixes(shape: ModelShape) -> list[tuple[str, str]]:
    layers = [(f"layers.{n}.", f"model.layers.{n}.") for n in range(shape.num_layers)]
    return [("", ""), *layers]


@contextmanager
def unpacked() -> Iterator[None]:
    """Keep models that are built in this block from packing their weights.

    On a CPU vLLM would pack a copy of every linear layer's weight and multiply by that.
    """
    packing = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = _multiply_by_parameter
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


def _multiply_by_parameter(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = F.linear


def refuse_copies(model: nn.Module) -> None:
    """Raises RuntimeError that lists the layers whose forward pass would miss a sync."""
    wrong = []
    for name, module in model.named_modules():
        packed = getattr(module, "cpu_linear", F.linear) is not F.linear
        gone = [p for p in module.parameters(recurse=False) if p.is_meta or not p.numel()]
        wrong += [name] if packed or gone else []
    if wrong:
        raise RuntimeError(
            f"vLLM keeps packed copies of weights that a sync would not reach: {', '.join(wrong)}"
        )
