"""Floating-point operations that training asks for, and how many a GPU can do."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from mesh.types import ModelShape

PEAKS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 operations per second of a GPU whose name has these words, of several the first one:
NVIDIA's data sheets, which for most of them print the rate with sparsity, twice as high."""


def peak_flops(device: torch.device) -> float:
    """Dense bf16 operations per second of a device; NaN where they are not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.nan


def peak_of(name: str) -> float:
    """`peak_flops` of a GPU by its name, e.g. "NVIDIA H100 80GB HBM3"; a slice (MIG) is unknown."""
    found = [peak for words, peak in PEAKS.items() if all(_has(name, w) for w in words.split())]
    return found[0] if found and not _has(name, "MIG") else math.nan


def _has(name: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", name) is not None


def train_flops(shape: ModelShape, lengths: Sequence[int], num_loss_tokens: int) -> float:
    """Operations of a forward and backward pass over sequences of these lengths [tokens], with so
    many loss tokens among them.

    A weight that is multiplied counts 6 for each token: 2 forward, 4 backward (arXiv:2001.08361,
    section 2.1). The head is multiplied for loss tokens only; an embedding is looked up. Attention
    is 12 for each query and key that sees it, in each of a head's dims: scores and values, forward
    and backward. What is computed twice to save memory counts once.
    """
    queries, keys = (heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads))
    weights = 2 * shape.dim * (queries + keys) + 3 * shape.dim * shape.ffn_dim
    pairs = sum(length * (length + 1) // 2 for length in lengths)  # causal
    layer = 6.0 * weights * sum(lengths) + 12.0 * queries * pairs
    return shape.num_layers * layer + 6.0 * shape.dim * shape.vocab_size * num_loss_tokens
