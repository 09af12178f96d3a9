"""Scores of vocabulary tiles, gathered over ranks and combined in one fixed order.

The plain functions are the specification of the kernels in `triton_scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.invariant.reductions import tree_sum
from mesh.model.vocabulary import MAX_TILE


def tile_logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))) over the last dim, via log_softmax.

    At the largest logit log_softmax is exactly -log(sum(exp(z - max))). On CUDA log_softmax does
    not depend on the number of rows; `logsumexp` does.
    """
    return logits.amax(-1) - F.log_softmax(logits, dim=-1).amax(-1)


def combine_logsumexp(tiles_KA: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over tiles, [K, A] -> [A]."""
    peak_A = tiles_KA.amax(0)
    return peak_A + sum_tiles((tiles_KA - peak_A).exp()).log()


def sum_tiles(terms_KA: torch.Tensor) -> torch.Tensor:
    """Sum over tiles, [K, A] -> [A], along one fixed binary tree.

    `Tensor.sum` adds in an order that depends on the column's place and on their number.
    """
    while (count := len(terms_KA)) > 1:
        pairs = terms_KA[: count - 1 : 2] + terms_KA[1::2]
        terms_KA = torch.cat([pairs, terms_KA[-1:]]) if count % 2 else pairs
    return terms_KA[0]


def gather_tiles(tiles_KA: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Tiles of all vocabulary shards in vocabulary order, [K, A] -> [K * shards, A]."""
    if group is None:
        return tiles_KA
    size = dist.get_world_size(group)
    out = tiles_KA.new_empty(size * tiles_KA.shape[0], *tiles_KA.shape[1:])
    dist.all_gather_single(out, tiles_KA.contiguous(), group=group)
    return out


def gather_shards(part_SX: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Concatenate the ranks' parts along the last dim."""
    if group is None:
        return part_SX
    parts = [torch.empty_like(part_SX) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part_SX.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def shard_of(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(index, count) of this rank's vocabulary shard."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def plain_tile_scores(
    logits_AV: torch.Tensor,
    edges: Sequence[int],
    targets_A: torch.Tensor,
    temperature: float,
    with_moment: bool,
) -> torch.Tensor:
    """`tile_scores` in PyTorch operators: all tiles at once if they are small and of equal width
    (whatever the number of rows), else one tile at a time in fp32.
    """
    width = edges[1] - edges[0]
    equal = all(last - first == width for first, last in pairwise(edges))
    if len(edges) > 2 and (not equal or edges[-1] - edges[0] > MAX_TILE):
        tiles = [
            (logits_AV[:, first - edges[0] : last - edges[0]], (first, last))
            for first, last in pairwise(edges)
        ]
        return torch.cat(
            [plain_tile_scores(*t, targets_A, temperature, with_moment) for t in tiles]
        )
    z_AKW = (logits_AV.float() / temperature).unflatten(-1, (-1, width))
    logsumexp_AK = tile_logsumexp(z_AKW)
    moment_AK = torch.zeros_like(logsumexp_AK)
    if with_moment:
        moment_AK = tree_sum(F.softmax(z_AKW, dim=-1) * z_AKW)
    index_A1 = (targets_A - edges[0])[:, None]
    picked_A1 = z_AKW.flatten(1).gather(1, index_A1.clamp(0, edges[-1] - edges[0] - 1))
    holder_K = torch.arange(z_AKW.shape[1], device=index_A1.device)
    picked_AK = picked_A1.where(index_A1 // width == holder_K, -torch.inf)
    return torch.stack([logsumexp_AK, picked_AK, moment_AK]).permute(2, 0, 1).contiguous()


def tile_scores(
    logits_AV: torch.Tensor,
    edges: Sequence[int],
    targets_A: torch.Tensor,
    temperature: float,
    with_moment: bool,
) -> torch.Tensor:
    """Scores of K adjacent tiles, fp32 [K, 3, A], of z = logits / temperature.

    Per tile: its log-sum-exp; the target's z if it holds the target, else -inf; the mean of z under
    its softmax (undefined without `with_moment`). logits_AV: the matmul's output, columns edges[0]
    to edges[-1] of this rank's vocabulary shard.
    """
    if logits_AV.is_cuda:
        from mesh.model import triton_scores  # needs a GPU driver

        return triton_scores.tile_scores(logits_AV, edges, targets_A, temperature, with_moment)
    return plain_tile_scores(logits_AV, edges, targets_A, temperature, with_moment)


def plain_combine_scores(scores_K3A: torch.Tensor, with_entropy: bool) -> tuple[torch.Tensor, ...]:
    """`combine_scores` in PyTorch operators."""
    tiles_KA, target_KA, moment_KA = scores_K3A.unbind(1)
    logsumexp_A = combine_logsumexp(tiles_KA)
    entropy_A = torch.zeros_like(logsumexp_A)
    if with_entropy:
        entropy_A = logsumexp_A - sum_tiles((tiles_KA - logsumexp_A).exp() * moment_KA)
    return target_KA.amax(0) - logsumexp_A, entropy_A, logsumexp_A


def combine_scores(scores_K3A: torch.Tensor, with_entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logprobs_A, entropy_A, logsumexp_A) over all tiles; entropy is 0 unless `with_entropy`."""
    if scores_K3A.is_cuda:
        from mesh.model import triton_scores  # needs a GPU driver

        return triton_scores.combine_scores(scores_K3A, with_entropy)
    return plain_combine_scores(scores_K3A, with_entropy)
