"""Matrix products in Triton for Hopper GPUs, bitwise equal to cuBLASLt without split-K.

Every element is one sum over K in order, 16 tensor-core products at a time, so the tile may depend
on the number of rows without changing bits. For few rows operands are swapped (weights take the
side that needs 64), and a product costs what reading its weight costs. Tuned on an H100; LOG.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

FEW = 32  # rows up to which this kernel is faster at every shape
NARROW, NARROW_ROWS = 2048, 64  # outputs up to which it is, for more rows


class GemmTile(NamedTuple):
    """A tile of the product and its launch settings."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def tile_of(rows: int) -> GemmTile:
    """The tile for a product of `rows` rows."""
    if rows <= 64:
        return GemmTile(16 if rows <= 16 else 32, 16, 256, 2, 4)
    return GemmTile(128, 128, 64, 8, 4)


def is_fast(rows: int, outputs: int) -> bool:
    """True if `matmul` beats cuBLASLt without split-K at this size."""
    return rows <= FEW or (rows <= NARROW_ROWS and outputs <= NARROW)


def fits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if a [M, K] @ b [K, N] needs no copies: a row-major, b column-major, both aligned."""
    aligned = (a.data_ptr() | b.data_ptr()) % 16 == 0 and (a.stride(0) | b.stride(1)) % 8 == 0
    plain = a.stride(1) == 1 and b.stride(0) == 1 and a.numel() > 0 and b.numel() > 0
    return plain and aligned and a.dtype == b.dtype == torch.bfloat16


@triton.jit
def _swapped_product_kernel(
    a_rows, b_columns, out, rows, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(1) * ROWS
    first_output = tl.program_id(0) * OUTPUTS
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k in range(0, inputs, INPUTS):  # out of bounds, a descriptor loads zeros
        part = b_columns.load([first_output, k])
        total = tl.dot(part, a_rows.load([first_row, k]).T, total)
    row = (first_row + tl.arange(0, ROWS))[None, :]
    output = (first_output + tl.arange(0, OUTPUTS))[:, None]
    place = out + row.to(tl.int64) * outputs + output
    tl.store(place, total.to(tl.bfloat16), mask=(row < rows) & (output < outputs))


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] @ b [K, N], bfloat16 with fp32 sums. Operands that fail `fits` are copied."""
    (rows, inputs), outputs = a.shape, b.shape[1]
    out = a.new_empty(rows, outputs)
    if not out.numel():
        return out
    if not inputs:
        return out.zero_()
    if not fits(a, b):
        a, b = _aligned(a), _aligned(b.t()).t()
    tile = tile_of(rows)
    grid = (triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, tile.rows))
    _swapped_product_kernel[grid](
        TensorDescriptor(a, [rows, inputs], [a.stride(0), 1], [tile.rows, tile.inputs]),
        TensorDescriptor(b, [outputs, inputs], [b.stride(1), 1], [tile.outputs, tile.inputs]),
        out, rows, outputs, inputs,
        ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy of a matrix with 16-byte-aligned rows."""
    place = x.new_empty(len(x), -(-x.shape[1] // 8) * 8)
    return place[:, : x.shape[1]].copy_(x)
