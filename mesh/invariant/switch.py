"""The batch-invariance switch: set once, before the first process group; undone in `finally`.

It overrides matrix products, softmaxes and means below autograd, at the device's dispatch key, so
that every caller - our model or a library - gets the invariant kernels. Operators that PyTorch
computes row by row anyway (RMSNorm, embedding, elementwise arithmetic) are left alone, and so are
matrix-vector products (`mv`, `dot`), which this program does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mesh.invariant.kernels import KernelChoices, overrides


@dataclass(frozen=True)
class Invariance:
    """The active switch. chunks: equal pieces that the output features of linear layers are split
    into; tp must divide it.
    """

    device_type: str
    chunks: int
    choices: KernelChoices = field(default_factory=KernelChoices)


_current: Invariance | None = None
_undo: ExitStack | None = None


def current() -> Invariance | None:
    """The active switch; None while it is off."""
    return _current


def use_fallback(shapes: Iterable[tuple[int, int]]) -> None:
    """Take products of these (K, N) off the vendor library from now on."""
    assert _current is not None, "batch invariance is off"
    _current.choices.tiled.update(shapes)


def use_ordinary_softmax(widths: Iterable[int]) -> None:
    """Leave softmax to PyTorch for exactly these sizes of the last dim from now on."""
    assert _current is not None, "batch invariance is off"
    _current.choices.widths.clear()
    _current.choices.widths.update(widths)


@contextmanager
def batch_invariant(enabled: bool, device_type: str, chunks: int = 4) -> Iterator[None]:
    """Turn the switch on for a block; do nothing if not `enabled`.

    On exit PyTorch's kernels are restored. Not reentrant.
    """
    global _current
    if not enabled or (device_type == "cuda" and not torch.cuda.is_available()):
        yield  # a missing GPU is reported where the process starts
        return
    assert _current is None, "batch invariance is already on"
    with _overridden(Invariance(device_type, chunks)):
        yield


@contextmanager
def ordinary_kernels() -> Iterator[None]:
    """Suspend the switch for a block, as a control: PyTorch's kernels run inside."""
    global _current, _undo
    switch, undo = _current, _undo
    assert switch is not None and undo is not None, "batch invariance is off"
    undo.close()
    _current = _undo = None
    try:
        yield
    finally:
        _current, _undo = switch, undo
        _override(switch, undo)


@contextmanager
def _overridden(switch: Invariance) -> Iterator[None]:
    global _current, _undo
    with ExitStack() as undo:
        _override(switch, undo)
        _current, _undo = switch, undo
        try:
            yield
        finally:
            _current = _undo = None


def _override(switch: Invariance, undo: ExitStack) -> None:
    key = {"cpu": "CPU", "cuda": "CUDA"}[switch.device_type]
    undo.callback(_replace(key, overrides(switch.device_type, switch.choices)))
    if switch.device_type == "cuda":
        undo.callback(_disable_split_k())


def _replace(key: str, kernels: dict[str, Callable[..., Any]]) -> Callable[[], None]:
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel, key, with_keyset=True, allow_override=True)
    return library._destroy


def _disable_split_k() -> Callable[[], None]:
    """Select cuBLASLt without split-K, whose order over K does not depend on the number of rows."""
    matmul = torch.backends.cuda.matmul
    library = torch.backends.cuda.preferred_blas_library()
    reduction = matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul.allow_bf16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]

    def restore() -> None:
        torch.backends.cuda.preferred_blas_library(library)
        matmul.allow_bf16_reduced_precision_reduction = reduction

    return restore
