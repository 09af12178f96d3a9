"""Kernels that the switch registers in place of PyTorch's, on CPU and CUDA.

Matrix products, softmaxes and means, with their `.out` variants, each batch-invariant by
construction (`matmul`, `reductions`). PyTorch's own softmax kernels are faster and were
row-invariant on every machine tried, so they stay for the widths that the self-test confirms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mesh.invariant.matmul import MatMul, product_of
from mesh.invariant.reductions import mean_dim, softmax

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class KernelChoices:
    """The self-test's findings on this machine; must be equal on all ranks.

    tiled: (K, N) of the products moved off the vendor library; widths: sizes of the last dim for
    which softmax stays PyTorch's.
    """

    tiled: set[tuple[int, int]] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)


def overrides(device_type: str, choices: KernelChoices) -> dict[str, Kernel]:
    """Kernels to register, by operator name. Call it before any of them is registered."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    mm = torch.library.get_kernel("aten::mm", key)
    kernels = {
        **products(product_of(device_type, mm, choices.tiled)),
        "_softmax": softmax_over("_softmax", key, choices),
        "_log_softmax": softmax_over("_log_softmax", key, choices),
        "mean.dim": mean_dim,
    }
    return kernels | {
        name.partition(".")[0] + ".out": out_variant(kernel) for name, kernel in kernels.items()
    }


def out_variant(kernel: Kernel) -> Kernel:
    """Wrap a kernel as its `.out` variant."""

    def write(*args: Any, out: torch.Tensor, **keywords: Any) -> torch.Tensor:
        if kernel is mean_dim and keywords.get("dtype") is None:
            keywords["dtype"] = out.dtype
        result = kernel(*args, **keywords)
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return write


def products(product: MatMul) -> dict[str, Kernel]:
    """The matrix-product operators, on top of `mm`."""

    def addmm(keyset: Any, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        total = product(keyset, a, b)
        total = total if alpha == 1 else total * alpha
        return total if beta == 0 else total + (bias if beta == 1 else bias * beta)

    def bmm(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert len(a) == len(b), f"bmm: batch sizes {len(a)} and {len(b)} differ"
        if not len(a):
            return a.new_empty(len(a), a.shape[1], b.shape[2])
        return torch.stack([product(keyset, x, y) for x, y in zip(a, b, strict=True)])

    return {"mm": product, "addmm": addmm, "bmm": bmm}


def softmax_over(name: str, key: str, choices: KernelChoices) -> Kernel:
    """`_softmax` or `_log_softmax`: PyTorch's kernel for confirmed widths, else ours."""
    native = torch.library.get_kernel(f"aten::{name}", key)

    def kernel(keyset: Any, x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
        if x.ndim and dim in (-1, x.ndim - 1) and x.shape[-1] in choices.widths:
            return native.call_boxed(keyset, x, dim, half_to_float)
        return softmax(x, dim, half_to_float, log=name == "_log_softmax")

    return kernel
