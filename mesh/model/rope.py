"""The table of RoPE: cosines and sines of every position, with plain or scaled frequencies."""

from __future__ import annotations

import math

import torch

from mesh.types import RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Radians a position by pair of features, fp32 [head_dim / 2], on the CPU.

    With the operations of `transformers`, in its order (modeling_rope_utils.py): the bits are the
    same.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _llama3(plain, scaling)


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_positions
    wavelength = 2 * math.pi / plain
    is_long, is_short = wavelength > original / low, wavelength < original / high
    scaled = torch.where(is_long, plain / scaling.factor, plain)
    share = (original / wavelength - low) / (high - low)
    between = (1 - share) * scaled / scaling.factor + share * scaled
    return torch.where(is_long | is_short, scaled, between)


def rope_table(
    head_dim: int,
    max_length: int,
    theta: float,
    device: torch.device,
    scaling: RopeScaling | None = None,
) -> torch.Tensor:
    """Cosines and sines of every position, fp32 [max_length, 2 * head_dim].

    Computed on the CPU for any device, so that all ranks and roles have the same bits.
    """
    inverse = inverse_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(max_length, device="cpu").float(), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
