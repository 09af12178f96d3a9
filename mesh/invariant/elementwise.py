"""SwiGLU on CPU, with bits that do not depend on an element's position.

PyTorch's silu rounds differently in the vector lanes and in the scalar tail of a thread's range;
exp, addition and division do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        wide = gate.float()
        return (wide / wide.neg().exp_().add_(1)).to(gate.dtype).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in their dtype; the backward pass is PyTorch's."""
    return _SiluTimes.apply(gate, up)
