"""Exchanges of tokens between tensor-parallel ranks, for sequence parallelism.

Tokens (dim -2, no batch in front) are cut into equal shards; where they do not divide, the last
ranks' shards are filled up with rows of zeros, which gathering drops again. Batch-invariant, sums
over the ranks follow one binary tree, whatever the number of tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.invariant.switch import current


def add_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum of a power of two of tensors along a balanced binary tree, neighbours first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def shard_size(num_tokens: int, group: dist.ProcessGroup) -> int:
    """Rows of every rank's shard of `num_tokens` tokens."""
    return -(-num_tokens // dist.get_world_size(group))


def pad_tokens(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Zeros below the tokens of x, up to `rows` of them. Returns [rows, D]."""
    assert x.shape[:-2].numel() == 1, "tokens are packed: there is no batch in front of them"
    x_TD = x.reshape(x.shape[-2:])
    return F.pad(x_TD, (0, 0, 0, rows - len(x_TD))).contiguous()


def shard_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's tokens of a tensor that all ranks have: [..., T, D] -> [..., T / ranks, D]."""
    rows = shard_size(x.shape[-2], group)
    first = dist.get_rank(group) * rows
    mine = pad_tokens(x[..., first : first + rows, :], rows)
    return mine.view(*x.shape[:-2], *mine.shape)


def gather_tokens(shard: torch.Tensor, num_tokens: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' tokens without their filling: [..., T / ranks, D] -> [..., T, D]."""
    rows = shard.shape[-2]
    assert rows == shard_size(num_tokens, group), f"{rows} rows are no shard of {num_tokens} tokens"
    whole = shard.new_empty(rows * dist.get_world_size(group), shard.shape[-1])
    dist.all_gather_single(whole, pad_tokens(shard, rows), group=group)
    return whole[:num_tokens].view(*shard.shape[:-2], num_tokens, shard.shape[-1])


def sum_to_shards(partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks of this rank's tokens: [..., T, D] -> [..., T / ranks, D].

    Batch-invariant, it is added in fp32 along the ranks' tree and rounded once.
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
