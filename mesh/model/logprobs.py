"""Token logprobs from hidden states, by fixed vocabulary tiles: one function for both roles.

    logprob = z[target] - logsumexp(z),  z = hidden @ weight^T / temperature

The vocabulary is cut into tiles by a rule that knows nothing of the mesh. A vocabulary-parallel
rank holds whole tiles; the tiles' log-sum-exps are gathered and combined in one fixed order, so
ranks are nothing but more tiles and [T, V] need not exist. The backward pass recomputes a tile's
logits (as Liger-Kernel, arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009, do).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.types import MAX_TP

MAX_TILE = 32768


class TokenScores(NamedTuple):
    """logprobs_A (differentiable) and entropy_A (not differentiable), both fp32 [A]."""

    logprobs_A: torch.Tensor
    entropy_A: torch.Tensor


def vocab_tiles(vocab_size: int, num_shards: int = 1) -> list[tuple[int, int]]:
    """Half-open tiles (first, last) of one of `num_shards` equal shards, in local indices.

    The tiles of the whole vocabulary are the same for every `num_shards` up to MAX_TP: it is halved
    as often as MAX_TP allows, and each part cut into pieces of at most MAX_TILE.
    Raises ValueError where `num_shards` does not cut the vocabulary at tile edges.
    """
    parts = MAX_TP
    while vocab_size % parts:
        parts //= 2
    if parts % num_shards:
        raise ValueError(f"a vocabulary of {vocab_size} cannot be cut into {num_shards} shards")
    width = vocab_size // parts
    per_part = -(-width // MAX_TILE)
    edges = [
        part * width + piece * width // per_part
        for part in range(parts)
        for piece in range(per_part)
    ]
    edges = [*edges[: len(edges) // num_shards], vocab_size // num_shards]
    return list(zip(edges[:-1], edges[1:], strict=True))


def tile_logits(
    hidden_AD: torch.Tensor, weight_tile: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Logits of one vocabulary tile over the temperature, fp32 [A, tile]."""
    return F.linear(hidden_AD, weight_tile).float() / temperature


def tile_logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))) over the last dim, by way of log_softmax.

    At the largest logit log_softmax is minus the log of the sum of exp(z - max), exactly; and
    log_softmax does not depend on the number of rows on CUDA, where `logsumexp` does.
    """
    return logits.amax(-1) - F.log_softmax(logits, dim=-1).amax(-1)


def combine_logsumexp(tiles_KA: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over tiles, [K, A] -> [A], added along one fixed binary tree."""
    peak_A = tiles_KA.amax(0)
    terms = list((tiles_KA - peak_A).exp())
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return peak_A + terms[0].log()


def gather_tiles(tiles_KA: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The tiles of all vocabulary shards in vocabulary order, [K, A] -> [K * shards, A]."""
    if group is None:
        return tiles_KA
    size = dist.get_world_size(group)
    out = tiles_KA.new_empty(size * tiles_KA.shape[0], *tiles_KA.shape[1:])
    dist.all_gather_into_tensor(out, tiles_KA.contiguous(), group=group)
    return out


def shard_of(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(index, number) of this rank's vocabulary shard."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _pick(logits: torch.Tensor, targets_A: torch.Tensor, first: int) -> torch.Tensor:
    """The targets' logits where the tile that starts at `first` holds them, else -inf. [A]"""
    index_A = targets_A - first
    inside_A = (index_A >= 0) & (index_A < logits.shape[-1])
    picked_A = logits.gather(-1, index_A.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    return picked_A.masked_fill(~inside_A, -torch.inf)


def score_tiles(
    tiles: Iterable[tuple[int, torch.Tensor]],
    targets_A: torch.Tensor,
    group: dist.ProcessGroup | None,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs_A, entropy_A, logsumexp_A) from this shard's tiles, in vocabulary order.

    tiles: (first index, logits / temperature) of each tile; targets_A: ids counted from the shard's
    start, also those of other shards. The entropy is zeros where it is not asked for.
    """
    logsumexps, picked, moments = [], [], []
    for first, logits in tiles:
        logsumexps.append(tile_logsumexp(logits))
        picked.append(_pick(logits, targets_A, first))
        if with_entropy:
            moments.append((F.softmax(logits, dim=-1) * logits).sum(-1))
    tiles_KA = gather_tiles(torch.stack(logsumexps), group)
    logsumexp_A = combine_logsumexp(tiles_KA)
    target_A = gather_tiles(torch.stack(picked).amax(0)[None], group).amax(0)
    entropy_A = torch.zeros_like(logsumexp_A)
    if with_entropy:
        mean_KA = gather_tiles(torch.stack(moments), group)
        entropy_A = logsumexp_A - ((tiles_KA - logsumexp_A).exp() * mean_KA).sum(0)
    return target_A - logsumexp_A, entropy_A, logsumexp_A


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_AD: torch.Tensor,
        weight: torch.Tensor,
        targets_A: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, ...]:
        shard, num_shards = shard_of(group)
        targets_A = targets_A - shard * weight.shape[0]
        tiles = (
            (first, tile_logits(hidden_AD, weight[first:last], temperature))
            for first, last in vocab_tiles(weight.shape[0] * num_shards, num_shards)
        )
        logprobs_A, entropy_A, logsumexp_A = score_tiles(tiles, targets_A, group, True)
        ctx.save_for_backward(hidden_AD, weight, targets_A, logsumexp_A)
        ctx.temperature, ctx.group, ctx.num_shards = temperature, group, num_shards
        ctx.mark_non_differentiable(entropy_A)
        return logprobs_A, entropy_A

    @staticmethod
    def backward(ctx: Any, grad_A: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        hidden_AD, weight, targets_A, logsumexp_A = ctx.saved_tensors
        grad_hidden_AD = torch.zeros_like(hidden_AD, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for first, last in vocab_tiles(weight.shape[0] * ctx.num_shards, ctx.num_shards):
            logits = tile_logits(hidden_AD, weight[first:last], ctx.temperature)
            grad = (logits - logsumexp_A[:, None]).exp_().neg_()
            index_A = targets_A - first
            inside_A = (index_A >= 0) & (index_A < last - first)
            index_A = index_A.clamp(0, last - first - 1)
            grad.scatter_add_(1, index_A[:, None], inside_A[:, None].to(grad.dtype))
            grad = (grad * (grad_A / ctx.temperature)[:, None]).to(hidden_AD.dtype)
            grad_hidden_AD += grad @ weight[first:last]
            grad_weight[first:last] = grad.t() @ hidden_AD
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_AD, group=ctx.group)
        return grad_hidden_AD.to(hidden_AD.dtype), grad_weight, None, None, None


def token_logprobs(
    hidden_AD: torch.Tensor,
    weight: torch.Tensor,
    targets_A: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None = None,
) -> TokenScores:
    """Logprob of every target token and the entropy of its distribution.

    hidden_AD: hidden states that predict the targets, replicated over `group`; weight: this rank's
    vocabulary shard [V / shards, D]; targets_A: global token ids. Temperature in units of logits.
    """
    return TokenScores(*_TokenLogprobs.apply(hidden_AD, weight, targets_A, temperature, group))
