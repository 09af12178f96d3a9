"""Token collectives between tensor-parallel ranks, for sequence parallelism.

Tokens (dim -2, no batch dim) are split into equal shards; where they do not divide, the last ranks'
shards are zero-padded, and gathering drops the padding. With batch invariance on, sums over ranks
follow one binary tree, whatever the number of tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.invariant.switch import current


def add_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum 2^n tensors along a balanced binary tree, neighbours first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def shard_size(num_tokens: int, group: dist.ProcessGroup) -> int:
    """Rows per rank when `num_tokens` tokens are sharded, padding included."""
    return -(-num_tokens // dist.get_world_size(group))


def pad_tokens(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Zero-pad the tokens of x to `rows` rows. Returns [rows, D]."""
    assert x.shape[:-2].numel() == 1, "tokens must be packed, without a batch dim"
    x_TD = x.reshape(x.shape[-2:])
    return F.pad(x_TD, (0, 0, 0, rows - len(x_TD))).contiguous()


def shard_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's shard of replicated tokens: [..., T, D] -> [..., T / ranks, D]."""
    rows = shard_size(x.shape[-2], group)
    first = dist.get_rank(group) * rows
    mine = pad_tokens(x[..., first : first + rows, :], rows)
    return mine.view(*x.shape[:-2], *mine.shape)


def gather_tokens(shard: torch.Tensor, num_tokens: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' tokens, padding dropped: [..., T / ranks, D] -> [..., T, D]."""
    rows = shard.shape[-2]
    assert rows == shard_size(num_tokens, group), f"{rows} rows: not a shard of {num_tokens} tokens"
    whole = shard.new_empty(rows * dist.get_world_size(group), shard.shape[-1])
    dist.all_gather_single(whole, pad_tokens(shard, rows), group=group)
    return whole[:num_tokens].view(*shard.shape[:-2], num_tokens, shard.shape[-1])


def sum_to_shards(partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Reduce-scatter over tokens: [..., T, D] -> [..., T / ranks, D].

    With batch invariance on, sums are in fp32 along the ranks' tree and rounded once.
    """
    ranks, rows = dist.get_world_size(group), shard_size(partial.shape[-2], group)
    sent = pad_tokens(partial, rows * ranks)
    if current() is None:
        mine = sent.new_empty(rows, sent.shape[-1])
        dist.reduce_scatter_single(mine, sent, group=group)
    else:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        mine = add_tree([part.float() for part in received.chunk(ranks)]).to(partial.dtype)
    return mine.view(*partial.shape[:-2], *mine.shape)
