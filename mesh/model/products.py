"""A model's matrix products, and their start-up self-test."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mesh.invariant.selftest import Product, self_test
from mesh.model.rowwise import compared_rows
from mesh.model.vocabulary import is_one_product, vocab_tiles
from mesh.types import ModelShape


def products_of(shape: ModelShape, max_tp: int = 1) -> list[Product]:
    """The linear layers of one block, and the vocabulary projection: whole, or as tiles, which tp
    does not split further. Neither does it split a kv head.
    """
    head = [Product(shape.dim, width, "lm_head", sharded=False) for width in tile_widths(shape)]
    if is_one_product(shape.vocab_size):
        head = [Product(shape.dim, shape.vocab_size, "lm_head")]
    parts = shape.num_kv_heads if shape.num_kv_heads < max_tp else None
    heads, kv_heads = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    return [
        Product(shape.dim, heads, "wq"),
        Product(shape.dim, kv_heads, "wk", parts=parts),
        Product(shape.dim, kv_heads, "wv", parts=parts),
        Product(heads, shape.dim, "wo"),
        Product(shape.dim, shape.ffn_dim, "w1"),
        Product(shape.dim, shape.ffn_dim, "w3"),
        Product(shape.ffn_dim, shape.dim, "w2"),
        *head,
    ]


def tile_widths(shape: ModelShape) -> list[int]:
    """Distinct widths of the vocabulary tiles, which are also log_softmax's."""
    return sorted({last - first for first, last in vocab_tiles(shape.vocab_size)})


def self_test_of(
    shape: ModelShape,
    max_tp: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> str:
    """Self-test a model, its products split over up to `max_tp` tensor-parallel ranks.

    Returns a one-line summary. Raises RuntimeError where results depend on the batch. Collective
    over `group`.
    """
    degrees = [degree for degree in range(1, max_tp + 1) if max_tp % degree == 0]
    others = compared_rows(shape, max_tp, dtype, device)
    return self_test(
        products_of(shape, max_tp), tile_widths(shape), degrees, dtype, device, group, others
    )
