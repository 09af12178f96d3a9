"""The switch: set once, before the first process group; undone in `finally`.

It replaces matrix products, softmaxes and means below autograd, for the device's dispatch key, so
that whatever calls them - this program's model or a library's - gets the invariant ones. What
PyTorch computes row by row already (RMSNorm, embedding, elementwise arithmetic) is left alone, and
so are products with a vector (`mv`, `dot`), which this program has none of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mesh.invariant.kernels import Choices, overrides


@dataclass(frozen=True)
class Invariance:
    """The switch while it is on. chunks: pieces into which the output features of linear layers can
    be cut, of which a rank has whole ones; tensor parallelism is at most that.
    """

    device_type: str
    chunks: int
    choices: Choices = field(default_factory=Choices)


_current: Invariance | None = None


def current() -> Invariance | None:
    """The switch, None while it is off."""
    return _current


def use_fallback(shapes: Iterable[tuple[int, int]]) -> None:
    """From now on, products of these (K, N) do not go through the vendor library."""
    assert _current is not None, "batch invariance is off"
    _current.choices.tiled.update(shapes)


def use_ordinary_softmax(widths: Iterable[int]) -> None:
    """From now on, softmaxes over a last dim of these sizes, and no other, are PyTorch's own."""
    assert _current is not None, "batch invariance is off"
    _current.choices.widths.clear()
    _current.choices.widths.update(widths)


@contextmanager
def batch_invariant(enabled: bool, device_type: str, chunks: int = 4) -> Iterator[None]:
    """Turn the switch on for a block, or (not `enabled`) leave everything as it is.

    Afterwards the ordinary kernels are back in the same process. It cannot be nested.
    """
    global _current
    if not enabled or (device_type == "cuda" and not torch.cuda.is_available()):
        yield  # a GPU that is not there is refused where the process starts
        return
    assert _current is None, "batch invariance is on already"
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    switch = Invariance(device_type, chunks)
    with ExitStack() as undo:
        undo.callback(_replace(key, overrides(device_type, switch.choices)))
        if device_type == "cuda":
            undo.callback(_order_cuda_blas())
        _current = switch
        try:
            yield
        finally:
            _current = None


def _replace(key: str, kernels: dict[str, Callable[..., Any]]) -> Callable[[], None]:
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel, key, with_keyset=True, allow_override=True)
    return library._destroy


def _order_cuda_blas() -> Callable[[], None]:
    """cuBLASLt without split-K: then the order over K does not depend on the number of rows."""
    matmul = torch.backends.cuda.matmul
    library = torch.backends.cuda.preferred_blas_library()
    reduction = matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul.allow_bf16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]

    def restore() -> None:
        torch.backends.cuda.preferred_blas_library(library)
        matmul.allow_bf16_reduced_precision_reduction = reduction

    return restore
