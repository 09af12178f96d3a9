"""The matrix products of a model, and the start-up self-test of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mesh.invariant.selftest import Product, self_test
from mesh.model.logprobs import at_once, vocab_tiles
from mesh.model.rowwise import compared_rows
from mesh.types import ModelShape


def products_of(shape: ModelShape) -> list[Product]:
    """Every linear layer of one block, and the vocabulary: whole, or its tiles, which no rank cuts
    further.
    """
    head = [Product(shape.dim, width, "lm_head", sharded=False) for width in tile_widths(shape)]
    if at_once(shape.vocab_size):
        head = [Product(shape.dim, shape.vocab_size, "lm_head")]
    heads, kv_heads = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    return [
        Product(shape.dim, heads, "wq"),
        Product(shape.dim, kv_heads, "wk"),
        Product(shape.dim, kv_heads, "wv"),
        Product(heads, shape.dim, "wo"),
        Product(shape.dim, shape.ffn_dim, "w1"),
        Product(shape.dim, shape.ffn_dim, "w3"),
        Product(shape.ffn_dim, shape.dim, "w2"),
        *head,
    ]


def tile_widths(shape: ModelShape) -> list[int]:
    """The different widths of vocabulary tiles: also those that log_softmax goes over."""
    return sorted({last - first for first, last in vocab_tiles(shape.vocab_size)})


def self_test_of(
    shape: ModelShape,
    most_ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> str:
    """The self-test of a model, its products cut for up to `most_ranks` tensor-parallel ranks.

    Returns a line that says what was done. Raises RuntimeError where results depend on the batch. A
    collective of `group`.
    """
    degrees = [degree for degree in range(1, most_ranks + 1) if most_ranks % degree == 0]
    others = compared_rows(shape, dtype, device)
    return self_test(products_of(shape), tile_widths(shape), degrees, dtype, device, group, others)
