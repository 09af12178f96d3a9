"""Means and softmaxes along a fixed binary tree, on any device.

They use only maxima and elementwise operations, whose rounding does not depend on an element's
position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dim along a balanced binary tree that depends on its size alone.

    Adds halves, not neighbours: contiguous reads are several times faster.
    """
    if not x.shape[-1]:
        return x.sum(-1)
    while (size := x.shape[-1]) > 1:
        first, second, *rest = x.split(size // 2, -1)
        x = torch.cat([first + second, *rest], -1) if rest else first + second
    return x[..., 0]


def softmax(x: torch.Tensor, dim: int, half_to_float: bool, log: bool) -> torch.Tensor:
    """aten::_softmax, or with `log` aten::_log_softmax, computed in fp32 (float64 in float64).

    `half_to_float`: return fp32 instead of x's dtype.
    """
    dtype = torch.float32 if half_to_float else x.dtype
    if not x.numel():
        return torch.empty_like(x, dtype=dtype)
    rows = x.reshape(1) if x.ndim == 0 else x
    work = rows if x.dtype == torch.float64 else rows.float()
    shifted = work - work.amax(dim, keepdim=True)
    terms = shifted.exp()
    total = tree_sum(terms.movedim(dim, -1)).unsqueeze(dim)
    return (shifted - total.log() if log else terms / total).to(dtype).reshape(x.shape)


def mean_dim(
    _: Any,
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """aten::mean.dim, computed in fp32 (float64 in float64)."""
    dims = [d % max(x.ndim, 1) for d in (dim or range(x.ndim))]
    kept = [d for d in range(x.ndim) if d not in dims]
    if not (dtype or x.dtype).is_floating_point:
        raise RuntimeError(
            f"mean(): the result dtype must be floating point, not {dtype or x.dtype}"
        )
    work = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    rows = x
    if dims != [x.ndim - 1]:  # norms skip it: on a CPU these calls cost as much as the sum
        rows = x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), -1)
    mean = (tree_sum(rows.to(work)) / rows.shape[-1]).to(dtype or x.dtype)
    if keepdim:
        mean = mean.reshape([1 if d in dims else x.shape[d] for d in range(x.ndim)])
    return mean
