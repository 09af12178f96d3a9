"""RoPE and SwiGLU on CUDA, one kernel launch each, forward and backward.

The plain functions in `mesh.model.layers` are the specification. Everything is fp32 inside and
elementwise, and each product and sum is rounded on its own (no fma contraction), so a row's bits
follow from the kernel's source, and RoPE's equal the plain function's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements per SwiGLU program


@triton.jit
def _rotate_heads(
    x, out, x_head, cos, sin, N: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Rotate N heads of one token. HEADS, LANES: N and HALF (head) as powers of two."""
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, LANES)[None]
    inside = (head < N) & (lane < HALF)
    source, target = x + head * x_head + lane, out + head * (2 * HALF) + lane
    left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (left * cos - right * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (right * cos + left * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    q, k, q_out, k_out, rope, q_token, q_head, k_token, k_head, rope_token, INVERSE: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, N_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)[None]
    row = rope + token * rope_token + lane
    cos = tl.load(row, mask=lane < HALF, other=0.0)
    sin = tl.load(row + 2 * HALF, mask=lane < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    q_to, k_to = q_out + token * (N * 2 * HALF), k_out + token * (K * 2 * HALF)
    _rotate_heads(q + token * q_token, q_to, q_head, cos, sin, N, N_HEADS, HALF, LANES)
    _rotate_heads(k + token * k_token, k_to, k_head, cos, sin, K, K_HEADS, HALF, LANES)


def _launch_rotate(
    q: torch.Tensor, k: torch.Tensor, rope_TE: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_TNH, k_TKH = (_dense_heads(x.flatten(0, -3)) for x in (q, k))
    (tokens, heads, head_dim), kv_heads = q_TNH.shape, k_TKH.shape[1]
    assert len(rope_TE) == tokens == len(k_TKH), "rope_TE needs one row per token"
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    _rotate_kernel[(tokens,)](
        q_TNH, k_TKH, *outs, rope_TE, *q_TNH.stride()[:2], *k_TKH.stride()[:2], rope_TE.stride(0),
        INVERSE=inverse, N=heads, K=kv_heads, N_HEADS=triton.next_power_of_2(heads),
        K_HEADS=triton.next_power_of_2(kv_heads), HALF=head_dim // 2,
        LANES=triton.next_power_of_2(head_dim // 2), enable_fp_fusion=False,
    )  # fmt: skip
    return outs


def _dense_heads(x_TNH: torch.Tensor) -> torch.Tensor:
    return x_TNH if x_TNH.stride(-1) == 1 else x_TNH.contiguous()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, rope_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rope_TE)
        return _launch_rotate(q, k, rope_TE, inverse=False)

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[Any, ...]:
        (rope_TE,) = ctx.saved_tensors
        return *_launch_rotate(grad_q, grad_k, rope_TE, inverse=True), None


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, rope_TE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layers.rotate` of packed q [..., T, N, H] and k [..., T, K, H]; dims before T are 1.

    rope_TE: fp32 rows of `rope_table`: cosines, then sines, each with two equal halves.
    """
    return _Rotate.apply(q, k, rope_TE)


@triton.jit
def _swiglu_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    g = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(gate, up, grad, grad_gate, grad_up, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    g = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    gated = 1 / (1 + tl.exp(-g))
    slope = gated * (1 + g * (1 - gated))  # of silu
    tl.store(grad_gate + index, (d * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + index, (d * (g * gated)).to(grad_up.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        _swiglu_kernel[grid](gate, up, out, gate.numel(), BLOCK=BLOCK, enable_fp_fusion=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        _swiglu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, grad.contiguous(), *grads, gate.numel(), BLOCK=BLOCK, enable_fp_fusion=False
        )
        return grads


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`layers.swiglu` of two tensors of equal shape and dtype, rounded once, at the end."""
    assert gate.shape == up.shape and gate.dtype == up.dtype, "gate and up differ in shape or dtype"
    return _SwiGLU.apply(gate, up)
