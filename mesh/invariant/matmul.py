"""The batch-invariant matrix product, registered in place of PyTorch's.

It calls the vendor library only in ways for which an element's bits do not depend on the other rows
and columns. On CPU, fp32 MKL qualifies for sums of at most DEPTH terms (it splits longer ones by
the number of rows, columns and threads), rows padded to a multiple of ROWS, and at least two
columns; oneDNN's bfloat16 fails with three threads, so bfloat16, whose products are exact in fp32,
takes the fp32 path. On CUDA, cuBLASLt without split-K qualifies for at least two rows. This was
measured on some machines and is guaranteed by nobody: the self-test checks the model's own shapes,
and moves those that fail to fixed-tile kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

ROWS = 16
DEPTH = 256
COLUMNS = 64

MatMul = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a dispatch key set, a [M, K] and b [K, N]."""


def product_of(device_type: str, mm: Any, tiled: Container[tuple[int, int]]) -> MatMul:
    """The device's product on top of the vendor kernel `mm`; shapes (K, N) in `tiled` use ours."""
    return (cuda_product if device_type == "cuda" else cpu_product)(mm, tiled)


def padded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """x, zero-padded below and on the right to that many rows and columns."""
    missing = (0, columns - x.shape[1], 0, rows - x.shape[0])
    return F.pad(x, missing) if any(missing) else x


def round_up(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def cpu_product(mm: Any, tiled: Container[tuple[int, int]]) -> MatMul:
    """Sums of DEPTH terms, added in order."""

    def by_depth(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape[1] <= DEPTH:
            return mm.call_boxed(keyset, a, b)
        total = mm.call_boxed(keyset, a[:, :DEPTH], b[:DEPTH])
        for first in range(DEPTH, a.shape[1], DEPTH):
            last = first + DEPTH
            total += mm.call_boxed(keyset, a[:, first:last], b[first:last])
        return total

    def by_tiles(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Every call has the same shape, so the library always takes the same path."""
        a = padded(a, round_up(a.shape[0], ROWS), a.shape[1]).contiguous()
        b = padded(b, b.shape[0], round_up(b.shape[1], COLUMNS))
        columns = [part.contiguous() for part in b.split(COLUMNS, 1)]
        rows = [torch.cat([by_depth(keyset, x, y) for y in columns], 1) for x in a.split(ROWS)]
        return torch.cat(rows)

    def product(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        (rows, inputs), outputs, dtype = a.shape, b.shape[1], a.dtype
        if inputs != b.shape[0] or dtype != b.dtype or not (a.is_floating_point() and rows):
            return mm.call_boxed(keyset, a, b)  # integer sums are exact; the rest are errors
        if dtype in (torch.bfloat16, torch.float16):
            a, b = a.float(), b.float()
        if (inputs, outputs) in tiled:
            total = by_tiles(keyset, a, b)
        else:
            a = padded(a, round_up(rows, ROWS), inputs)
            b = padded(b, inputs, max(outputs, 2))
            total = by_depth(keyset, a, b)
        if total.shape[1] != outputs:
            total = total[:, :outputs].contiguous()
        total = total if len(total) == rows else total[:rows]
        return total if dtype == total.dtype else total.to(dtype)

    return product


def cuda_product(mm: Any, tiled: Container[tuple[int, int]]) -> MatMul:
    """The library's product; our kernel where it is faster, or the library failed."""

    def product(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        few_rows, most_rows = few_rows_kernel()
        rows = a.shape[0]
        if rows > most_rows and not tiled:  # training's fast path
            return mm.call_boxed(keyset, a, b)
        if (a.shape[1], b.shape[1]) in tiled and a.dtype == b.dtype == torch.bfloat16:
            from mesh.invariant.triton_linear import matmul  # needs a GPU's driver

            return matmul(a, b)
        if few_rows is not None and (result := few_rows(a, b)) is not None:
            return result
        if rows != 1:
            return mm.call_boxed(keyset, a, b)
        return mm.call_boxed(keyset, padded(a, 2, a.shape[1]), b)[:1]

    return product


FewRows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


@cache
def few_rows_kernel() -> tuple[FewRows | None, int]:
    """(kernel for products of few rows, the most rows it is for); None: this GPU needs none.

    Its bits are the library's; it returns None for shapes where the library is faster.
    """
    if torch.cuda.get_device_capability()[0] != 9:
        return None, 1
    from mesh.invariant.triton_linear import NARROW_ROWS, fits, is_fast, matmul  # needs a driver

    def few_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
        fast = is_fast(a.shape[0], b.shape[1]) and fits(a, b)
        return matmul(a, b) if fast else None

    return few_rows, NARROW_ROWS
