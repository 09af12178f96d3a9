"""What the switch registers in the place of PyTorch's kernels, on the CPU and on CUDA.

Matrix products, softmaxes and means, with their `.out` variants, each a function of ours that is
invariant by the way it computes (`matmul`, `reductions`). The ordinary softmax kernels are faster
and were found to go row by row on every machine tried: they stay in place for the widths where the
self-test has confirmed that on this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mesh.invariant.matmul import Product, product_of
from mesh.invariant.reductions import mean_dim, softmax

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Choices:
    """What the self-test found on this machine; all ranks have to have the same.

    tiled: (K, N) of the products that do not go through the vendor library; widths: sizes of the
    last dim over which softmaxes are PyTorch's own.
    """

    tiled: set[tuple[int, int]] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)


def overrides(device_type: str, choices: Choices) -> dict[str, Kernel]:
    """The kernels to register, by operator name. Call it while the ordinary ones are in place."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    mm = torch.library.get_kernel("aten::mm", key)
    kernels = {
        **products(product_of(device_type, mm, choices.tiled)),
        "_softmax": softmax_over("_softmax", key, choices),
        "_log_softmax": softmax_over("_log_softmax", key, choices),
        "mean.dim": mean_dim,
    }
    return kernels | {name.partition(".")[0] + ".out": into(kernels[name]) for name in kernels}


def into(kernel: Kernel) -> Kernel:
    """The `.out` variant of a kernel."""

    def write(*args: Any, out: torch.Tensor, **keywords: Any) -> torch.Tensor:
        if kernel is mean_dim and keywords.get("dtype") is None:
            keywords["dtype"] = out.dtype
        result = kernel(*args, **keywords)
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return write


def products(product: Product) -> dict[str, Kernel]:
    """The operators that are matrix products."""

    def addmm(keyset: Any, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        total = product(keyset, a, b)
        total = total if alpha == 1 else total * alpha
        return total if beta == 0 else total + (bias if beta == 1 else bias * beta)

    def bmm(keyset: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert len(a) == len(b), f"batches of {len(a)} and {len(b)} matrices do not fit"
        if not len(a):
            return a.new_empty(len(a), a.shape[1], b.shape[2])
        return torch.stack([product(keyset, x, y) for x, y in zip(a, b, strict=True)])

    return {"mm": product, "addmm": addmm, "bmm": bmm}


def softmax_over(name: str, key: str, choices: Choices) -> Kernel:
    """`_softmax` or `_log_softmax`: the ordinary kernel for confirmed widths, else ours."""
    ordinary = torch.library.get_kernel(f"aten::{name}", key)

    def kernel(keyset: Any, x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
        if x.ndim and dim in (-1, x.ndim - 1) and x.shape[-1] in choices.widths:
            return ordinary.call_boxed(keyset, x, dim, half_to_float)
        return softmax(x, dim, half_to_float, log=name == "_log_softmax")

    return kernel
