"""KL(policy || teacher) over the whole vocabulary, tile by tile through both heads.

    KL = sum(p * (log p - log q)) = sum(p * (z - u)) - logsumexp(z) + logsumexp(u)

z are the policy's logits over the temperature, p its probabilities; u and q are the teacher's, at
the same temperature and over the same tiles: a teacher's head has the rows of the policy's
vocabulary. Neither side's [T, V] exists. The teacher gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mesh.invariant.reductions import tree_sum
from mesh.model.tiles import combine_logsumexp, sum_tiles, tile_logsumexp


class HeadInputs(NamedTuple):
    """A head before its product: hidden_AD, replicated over the ranks of its vocabulary, and this
    rank's rows of its weight."""

    hidden_AD: torch.Tensor
    weight: torch.Tensor


def plain_tile_divergence(
    logits_AV: torch.Tensor, teacher_AV: torch.Tensor, edges: Sequence[int], temperature: float
) -> torch.Tensor:
    """`tile_divergence` in PyTorch operators, one tile at a time in fp32."""
    found = []
    for first, last in pairwise(edge - edges[0] for edge in edges):
        z_AW, u_AW = (x[:, first:last].float() / temperature for x in (logits_AV, teacher_AV))
        difference_A = tree_sum(F.softmax(z_AW, dim=-1) * (z_AW - u_AW))
        found.append(torch.stack([tile_logsumexp(u_AW), difference_A]))
    return torch.stack(found)


def tile_divergence(
    logits_AV: torch.Tensor, teacher_AV: torch.Tensor, edges: Sequence[int], temperature: float
) -> torch.Tensor:
    """What K adjacent tiles add to the divergence, fp32 [K, 2, A]: the log-sum-exp of the teacher's
    tile; the mean of z - u under the softmax of the policy's tile.

    logits_AV, teacher_AV: both matmuls' outputs, columns edges[0] to edges[-1] of this rank's
    vocabulary shard.
    """
    if logits_AV.is_cuda:
        from mesh.model import triton_scores  # needs a GPU driver

        return triton_scores.tile_divergence(logits_AV, teacher_AV, edges, temperature)
    return plain_tile_divergence(logits_AV, teacher_AV, edges, temperature)


def combine_divergence(
    tiles_KA: torch.Tensor, teacher_K2A: torch.Tensor, logsumexp_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence_A, the teacher's logsumexp_A) over all tiles.

    tiles_KA, logsumexp_A: log-sum-exps of the policy, of the tiles and over the whole vocabulary.
    """
    teacher_KA, difference_KA = teacher_K2A.unbind(1)
    teacher_logsumexp_A = combine_logsumexp(teacher_KA)
    mean_A = sum_tiles((tiles_KA - logsumexp_A).exp() * difference_KA)
    return mean_A - (logsumexp_A - teacher_logsumexp_A), teacher_logsumexp_A
