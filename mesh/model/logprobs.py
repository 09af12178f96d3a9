"""Token logprobs from hidden states, over fixed vocabulary tiles: one function for both roles.

    logprob = z[target] - logsumexp(z),  z = hidden @ weight^T / temperature

The vocabulary is split into tiles independently of the mesh. A vocabulary-parallel rank holds whole
tiles; the tiles' log-sum-exps are gathered and combined in one fixed order, so ranks are just more
tiles and [T, V] need not exist. The backward pass recomputes the logits (as Liger-Kernel,
arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009, do). On CUDA each pass over the logits is
a kernel of `triton_scores`, specified by the plain functions here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.invariant.reductions import tree_sum
from mesh.model.vocabulary import MAX_TILE, mask_ids, vocab_products
from mesh.types import IdSpans


class TokenScores(NamedTuple):
    """logprobs_A (differentiable) and entropy_A (not differentiable), both fp32 [A]."""

    logprobs_A: torch.Tensor
    entropy_A: torch.Tensor


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


def plain_tile_gradient(
    logits_AV: torch.Tensor,
    first: int,
    targets_A: torch.Tensor,
    logsumexp_A: torch.Tensor,
    scale_A: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """`tile_gradient` in PyTorch operators."""
    grad = (logits_AV.float() / temperature - logsumexp_A[:, None]).exp_().neg_()
    index_A = targets_A - first
    inside_A = (index_A >= 0) & (index_A < grad.shape[1])
    index_A = index_A.clamp(0, grad.shape[1] - 1)
    grad.scatter_add_(1, index_A[:, None], inside_A[:, None].to(grad.dtype))
    return (grad * scale_A[:, None]).to(logits_AV.dtype)


def tile_gradient(
    logits_AV: torch.Tensor,
    first: int,
    targets_A: torch.Tensor,
    logsumexp_A: torch.Tensor,
    scale_A: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """(onehot(target) - softmax) * scale of the tile that starts at `first`, in the logits' dtype.

    logsumexp_A: over the whole vocabulary. Consumes the logits: on CUDA they are overwritten.
    """
    arguments = (logits_AV, first, targets_A, logsumexp_A, scale_A, temperature)
    if logits_AV.is_cuda:
        from mesh.model import triton_scores  # needs a GPU driver

        return triton_scores.tile_gradient(*arguments)
    return plain_tile_gradient(*arguments)


def score_tiles(
    pieces: Iterable[tuple[Sequence[int], torch.Tensor]],
    targets_A: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    with_entropy: bool,
) -> tuple[torch.Tensor, ...]:
    """(logprobs_A, entropy_A, logsumexp_A) from this shard's tiles, in vocabulary order.

    pieces: (edges, logits) of one or more adjacent tiles, the logits as the matmul returns them;
    targets_A: ids relative to the shard's start, other shards' too. Entropy is 0 unless
    `with_entropy`.
    """
    scores = [
        tile_scores(logits, edges, targets_A, temperature, with_entropy) for edges, logits in pieces
    ]
    scores_K3A = scores[0] if len(scores) == 1 else torch.cat(scores)
    return combine_scores(gather_tiles(scores_K3A, group), with_entropy)


def piece_logits(
    hidden_AD: torch.Tensor,
    weight: torch.Tensor,
    edges: Sequence[int],
    first: int,
    textless: IdSpans,
) -> torch.Tensor:
    """Logits of rows edges[0] to edges[-1] of this rank's `weight`, whose first row is id `first`;
    those of `textless` ids are masked.
    """
    logits_AV = F.linear(hidden_AD, weight[edges[0] : edges[-1]])
    mask_ids(logits_AV, textless, first + edges[0])
    return logits_AV


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_AD: torch.Tensor,
        weight: torch.Tensor,
        targets_A: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        textless: IdSpans,
    ) -> tuple[torch.Tensor, ...]:
        shard, num_shards = shard_of(group)
        first = shard * len(weight)
        targets_A = targets_A - first
        pieces = (
            (edges, piece_logits(hidden_AD, weight, edges, first, textless))
            for edges in vocab_products(len(weight), num_shards)
        )
        logprobs_A, entropy_A, logsumexp_A = score_tiles(
            pieces, targets_A, temperature, group, with_entropy=True
        )
        ctx.save_for_backward(hidden_AD, weight, targets_A, logsumexp_A)
        ctx.temperature, ctx.group, ctx.num_shards = temperature, group, num_shards
        ctx.first, ctx.textless = first, textless
        ctx.mark_non_differentiable(entropy_A)
        return logprobs_A, entropy_A

    @staticmethod
    def backward(ctx: Any, grad_A: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        hidden_AD, weight, targets_A, logsumexp_A = ctx.saved_tensors
        scale_A = grad_A / ctx.temperature
        grad_hidden_AD = torch.zeros_like(hidden_AD, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for edges in vocab_products(len(weight), ctx.num_shards):
            first, last = edges[0], edges[-1]
            logits = piece_logits(hidden_AD, weight, edges, ctx.first, ctx.textless)
            grad = tile_gradient(logits, first, targets_A, logsumexp_A, scale_A, ctx.temperature)
            grad_hidden_AD += grad @ weight[first:last]
            grad_weight[first:last] = grad.t() @ hidden_AD
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_AD, group=ctx.group)
        return grad_hidden_AD.to(hidden_AD.dtype), grad_weight, None, None, None, None


def token_logprobs(
    hidden_AD: torch.Tensor,
    weight: torch.Tensor,
    targets_A: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None = None,
    textless: IdSpans = (),
) -> TokenScores:
    """Logprob of every target token and the entropy of its distribution.

    hidden_AD: hidden states that predict the targets, replicated over `group`; weight: this rank's
    vocabulary shard [V / shards, D]; targets_A: global token ids. `temperature` divides the
    logits. Ids of `textless` have probability exactly 0, and their rows gradient exactly 0.
    """
    arguments = (hidden_AD, weight, targets_A, temperature, group, textless)
    return TokenScores(*_TokenLogprobs.apply(*arguments))
