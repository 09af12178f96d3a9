"""The exponential average of the weights, which is evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mesh.layout.holdings import local_tensors


class AveragedWeights:
    """Owns an fp32 copy of these weights, shard by shard, which begins as what they are.

    After an update the average a becomes w + decay (a - w): a difference, a product and a sum, each
    rounded once to fp32. So its bits depend neither on the layout nor on the device, and an average
    that equals its weight stays there.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def move(self) -> None:
        """Take in the weights of one update."""
        averages = list(local_tensors(self.tensors).values())
        weights = list(local_tensors(self.weights).values())
        torch._foreach_sub_(averages, weights)
        torch._foreach_mul_(averages, self.decay)
        torch._foreach_add_(averages, weights)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again as the weights are now."""
        for name, average in local_tensors(self.tensors).items():
            average.copy_(local_tensors({name: self.weights[name]})[name])
