"""AdamW on a GPU: its bits do not depend on how a weight is cut into shards, in either form."""

from __future__ import annotations

import pytest
import torch

from mesh.roles.averaging import AveragedWeights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EDGES = [0, 1, 8, 25, 1000, 65_537, 65_540, 1_000_003]


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_does_not_depend_on_how_a_weight_is_cut(fused):
    """Uneven pieces of one tensor, each alone and all in one optimizer: vectors end everywhere, and
    the kernels of many tensors group them otherwise."""
    generator = torch.Generator("cuda").manual_seed(0)
    whole = torch.randn(EDGES[-1], generator=generator, device="cuda")
    gradients = [torch.randn(EDGES[-1], generator=generator, device="cuda") for _ in range(4)]
    pairs = list(zip(EDGES, EDGES[1:], strict=False))

    def updated(pieces: list[tuple[int, int]]) -> torch.Tensor:
        weights = [whole[start:end].clone().requires_grad_() for start, end in pieces]
        adamw = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=fused or None)
        for number, gradient in enumerate(gradients):
            for weight, (start, end) in zip(weights, pieces, strict=True):
                weight.grad = gradient[start:end].clone() * 10.0**-number
            adamw.step()
        return torch.cat([weight.detach() for weight in weights])

    expected = updated([(0, EDGES[-1])])
    assert torch.equal(updated(pairs), expected)
    assert torch.equal(torch.cat([updated([pair]) for pair in pairs]), expected)


def test_the_average_has_the_bits_of_a_cpu():
    """Three rounded operations, which no compiler may fuse."""
    generator = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(100_003, generator=generator)}
    moved = {"w": start["w"] + torch.randn(100_003, generator=generator) * 1e-3}
    found = []
    for device in ("cpu", "cuda"):
        weights = {"w": start["w"].to(device, copy=True)}
        averaged = AveragedWeights(weights, 0.99)
        weights["w"].copy_(moved["w"])
        for _ in range(3):
            averaged.move()
        found.append(averaged.tensors["w"].cpu())
    assert torch.equal(*found) and not torch.equal(found[0], moved["w"])
