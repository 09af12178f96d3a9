"""PyTorch's own CPU kernels, broken on purpose, and the products with which it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mesh.invariant.selftest import Product

SOUND, BROKEN = Product(64, 96, "sound"), Product(160, 48, "broken")

Wrong = Callable[[torch.Tensor, torch.Tensor], bool]


@contextmanager
def vendor(name: str, wrong: Wrong) -> Iterator[None]:
    """Make PyTorch's CPU kernel `name` give other bits where wrong(first tensor, result)."""
    library = torch.library.Library("aten", "IMPL")
    ordinary = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keyset, *args):
        result = ordinary.call_boxed(keyset, *args)
        return torch.nextafter(result, result + 1) if wrong(args[0], result) else result

    library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def many_rows(a: torch.Tensor, result: torch.Tensor) -> bool:
    """Of the product of BROKEN's shape, rows beyond the 64th call for another kernel."""
    return a.shape == (a.shape[0], 160) and result.shape[1] == 48 and len(a) > 64
