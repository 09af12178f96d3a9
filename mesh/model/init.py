"""Random initialisation that does not depend on the mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from mesh.layout.reshard import Block

STD = 0.02


@torch.no_grad()
def random_weights(
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Mapping[str, Block | None],
    seed: int,
) -> None:
    """Fill local shards: norms with ones, biases with zeros, the rest from N(0, 0.02^2), the
    `initializer_range` of every family.

    Each weight has its own random stream, seeded by (seed, name); it is drawn whole on the tensor's
    device and sliced, one weight at a time. Names are filled in order, so tied weights, which share
    storage, get the values of the last of their names.
    """
    for name in sorted(tensors):
        target, block = tensors[name], blocks[name]
        if len(shapes[name]) == 1:
            target.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator(target.device).manual_seed(int.from_bytes(digest, "little"))
        whole = torch.empty(shapes[name], device=target.device)
        whole.normal_(0.0, STD, generator=generator)
        if block is not None and target.numel():
            target.copy_(whole[block.slices])
