"""Counter-based sampling: random numbers are a hash of seed, step, sample and position alone.

Tokens are drawn by the Gumbel-max trick: argmax(logits / temperature + noise), one noise per (token
key, vocabulary index). A maximum does not depend on the order in which it is taken, so the draw
adds no rounding: from logits of the same bits it gives the same token on any vocabulary sharding,
batch, kernel and engine.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from mesh.engine import kernels
from mesh.model.tiles import gather_shards, shard_of
from mesh.model.truncated import cut_of, mask_outside
from mesh.types import Sampling

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _bits(x: torch.Tensor) -> np.ndarray:
    """The bits of an int64 tensor as uint64, which NumPy shifts and multiplies as C does."""
    assert x.dtype == torch.int64, "the bits of another dtype would be read as 64-bit integers"
    return x.numpy().view(np.uint64)


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 (Steele, Lea, Flood 2014, fig. 16), wrapping."""
    x = x + _GAMMA
    x = (x ^ x >> 30) * _MIX1
    x = (x ^ x >> 27) * _MIX2
    return x ^ x >> 31


def token_keys(sampling: Sampling, ids_S2: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """64-bit key of each token to draw, int64 [S], on the CPU.

    ids_S2: int64 (prompt_id, sample_id) of every sequence; positions_S: index of the new token in
    its response.
    """
    return position_keys(sequence_keys(sampling, ids_S2), positions_S)


def sequence_keys(sampling: Sampling, ids_S2: torch.Tensor) -> torch.Tensor:
    """Part of `token_keys` that all tokens of a sequence share, int64 [S], on the CPU."""
    seed, step = np.array([sampling.seed, sampling.step], np.int64).view(np.uint64)
    prompt_S, sample_S = _bits(ids_S2).T
    key_S = np.full_like(prompt_S, seed)
    for part in (step, prompt_S, sample_S):
        key_S = mix64(key_S) ^ part
    return torch.from_numpy(key_S.view(np.int64))


def position_keys(sequence_keys_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """`token_keys` from `sequence_keys` and int64 positions; one kernel on CUDA."""
    if sequence_keys_S.is_cuda:
        return kernels.position_keys(sequence_keys_S, positions_S)
    key_S = mix64(mix64(_bits(sequence_keys_S)) ^ _bits(positions_S))
    return torch.from_numpy(key_S.view(np.int64))


def gumbel(keys_S: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Standard Gumbel noise for vocabulary entries first..last-1, fp32 [S, last - first], on the
    CPU.

    32 random bits per entry: murmur3's finaliser over the key's halves and the entry's index. The
    noise is -log(E), E = -log(1 - u) exponential; small E, the winners, come from the power series
    of the logarithm (exact to fp32 below 2^-8), because 1 - u would round their bits away.
    """
    entry_V = np.arange(first, last, dtype=np.uint32) * 0x9E3779B1
    keys_S1 = _bits(keys_S)[:, None]
    low_S1, high_S1 = keys_S1.astype(np.uint32), (keys_S1 >> 32).astype(np.uint32)
    bits = _murmur3(_murmur3(low_S1 ^ entry_V) ^ high_S1)
    # fp32 rounds the largest bits to 2^32: kept below 1, where the noise would be -inf
    uniform = np.minimum((bits.astype(np.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    series = uniform * (1 + uniform * (0.5 + uniform * (1 / 3 + uniform * 0.25)))
    exact = -torch.log(torch.from_numpy(1 - uniform))
    return -torch.log(torch.from_numpy(np.where(uniform < 2.0**-8, series, exact.numpy())))


def _murmur3(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finaliser (Appleby) on uint32, wrapping."""
    x = (x ^ x >> 16) * 0x85EBCA6B
    x = (x ^ x >> 13) * 0xC2B2AE35
    return x ^ x >> 16


def truncated(
    logits_SV: torch.Tensor, sampling: Sampling, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The logits from which tokens are drawn: those outside of the rows' truncated sets masked.

    logits_SV: this rank's vocabulary shard of logits. The same tensor where nothing is truncated,
    as in greedy sampling, or where `truncated_logprobs` are to be read from it too; else a copy.
    """
    if sampling.temperature == 0 or not sampling.drawn.truncated:
        return logits_SV
    cut = cut_of(gather_shards(logits_SV, group), sampling.drawn)
    shard, _ = shard_of(group)
    drawn_SV = logits_SV if sampling.truncated_logprobs else logits_SV.clone()
    mask_outside(drawn_SV, cut, shard * logits_SV.shape[-1])
    return drawn_SV


def draw(
    logits_SV: torch.Tensor,
    keys_S: torch.Tensor,
    sampling: Sampling,
    group: dist.ProcessGroup | None = None,
    divisor: float = 1.0,
) -> torch.Tensor:
    """One token per row, int64 [S], the same on every rank of `group`.

    logits_SV: this rank's vocabulary shard of `truncated` logits, to be divided by `divisor` in
    fp32, which gives logits / temperature. Greedy at temperature 0.
    """
    shard, _ = shard_of(group)
    first = shard * logits_SV.shape[-1]
    noise = sampling.temperature > 0
    best_S, token_S = _draw_shard(logits_SV, keys_S, first, noise, divisor)
    if group is None:
        return token_S
    best_SX = gather_shards(best_S[:, None], group)
    token_SX = gather_shards(token_S[:, None] + first, group)
    return token_SX.gather(-1, best_SX.argmax(-1, keepdim=True))[:, 0]


def _draw_shard(
    logits_SV: torch.Tensor, keys_S: torch.Tensor, first: int, noise: bool, divisor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest perturbed logit [S], its index in the shard [S]); see `kernels.draw_shard`."""
    if logits_SV.is_cuda:
        return kernels.draw_shard(logits_SV, keys_S, first, noise, divisor)
    z = logits_SV.float() / divisor
    if noise:
        z = z + gumbel(keys_S, first, first + z.shape[-1])
    best_S, token_S = z.max(-1)
    return best_S, token_S
