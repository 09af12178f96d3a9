"""What the switch puts in the place of PyTorch's kernels, on the CPU and on CUDA.

Matrix products keep the vendor library and pad the rows: to a multiple of ROWS, the library's
result for a row no longer depends on how many rows there are (MKL and oneDNN, one thread; on CUDA
only a single row takes another path once split-K is off). That was measured on some machines and is
promised by nobody: validation compares it for the model's own shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

ROWS = 16


def missing_rows(rows: int, device_type: str) -> int:
    """How many rows of zeros a product of `rows` rows gets below them."""
    if device_type == "cuda":
        return int(rows == 1)
    return -rows % ROWS


def overrides(device_type: str) -> dict[str, Callable[..., Any]]:
    """The kernels to register, by operator name. Call it while the ordinary ones are in place."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    mm = torch.library.get_kernel("aten::mm", key)

    def product(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        padding = missing_rows(a.shape[0], device_type)
        if not padding:
            return mm.call_boxed(keyset, a, b)
        return mm.call_boxed(keyset, F.pad(a, (0, 0, 0, padding)), b)[: a.shape[0]]

    def mm_out(keyset: Any, a: Any, b: Any, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(product(keyset, a, b))

    def addmm(keyset: Any, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        total = product(keyset, a, b)
        total = total if alpha == 1 else total * alpha
        return total if beta == 0 else total + (bias if beta == 1 else bias * beta)

    def addmm_out(
        keyset: Any, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1, out: torch.Tensor
    ) -> torch.Tensor:
        return out.copy_(addmm(keyset, bias, a, b, beta=beta, alpha=alpha))

    def bmm(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not len(a):
            return a.new_empty(len(a), a.shape[1], b.shape[2])
        return torch.stack([product(keyset, x, y) for x, y in zip(a, b, strict=True)])

    def bmm_out(keyset: Any, a: Any, b: Any, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(bmm(keyset, a, b))

    return {
        "mm": product,
        "mm.out": mm_out,
        "addmm": addmm,
        "addmm.out": addmm_out,
        "bmm": bmm,
        "bmm.out": bmm_out,
        "mean.dim": mean_dim,
        "mean.out": mean_out,
    }


def mean_dim(
    _: Any,
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Mean over `dim` along a fixed binary tree of its elements, fp32 inside (float64 kept)."""
    dims = [d % max(x.ndim, 1) for d in (dim or range(x.ndim))]
    kept = [d for d in range(x.ndim) if d not in dims]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), -1).to(work)
    mean = (tree_sum(rows) / rows.shape[-1]).to(dtype or x.dtype)
    if keepdim:
        mean = mean.reshape([1 if d in dims else x.shape[d] for d in range(x.ndim)])
    return mean


def mean_out(
    keyset: Any,
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`mean_dim` into `out`."""
    return out.copy_(mean_dim(keyset, x, dim, keepdim, dtype=dtype or out.dtype))


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dim along a balanced binary tree that its size alone fixes.

    Only elementwise additions, which round alike in every lane of every kernel.
    """
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0] if x.shape[-1] else x.sum(-1)
