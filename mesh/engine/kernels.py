"""The draw of `mesh.engine.sampler` as one pass over the logits, and its keys (Triton, CUDA).

The plain function builds a dozen [S, V] temporaries, which for a vocabulary of 152k cost more than
the model's forward pass. The hash is integer arithmetic and so the same in both; the logarithms
differ in the last bit, which changes a token only where two perturbed logits are nearly equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mesh.model.triton_scores import inverse_of

BLOCK = 4096
KEYS = 256  # per program


@triton.jit
def _murmur3(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _mix64(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["rows"])
def _key_kernel(sequence_keys, positions, keys, rows, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    key = tl.load(sequence_keys + row, mask=inside, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row, mask=inside, other=0).to(tl.int64)
    key = _mix64(_mix64(key) ^ position.to(tl.uint64, bitcast=True))
    tl.store(keys + row, key.to(tl.int64, bitcast=True), mask=inside)


def position_keys(sequence_keys_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """`sampler.position_keys`, int64 [S]."""
    keys_S = torch.empty_like(sequence_keys_S)
    rows = len(keys_S)
    _key_kernel[(triton.cdiv(rows, KEYS),)](sequence_keys_S, positions_S, keys_S, rows, ROWS=KEYS)
    return keys_S


@triton.jit
def _draw_kernel(
    logits,
    keys,
    best,
    token,
    vocab,
    first,
    row_stride,
    num_blocks,
    inverse,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocab
    value = tl.load(logits + row * row_stride + index, mask=inside, other=float("-inf"))
    value = value.to(tl.float32) * inverse
    if NOISE:
        key = tl.load(keys + row).to(tl.uint64, bitcast=True)
        low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
        entry = (index + first).to(tl.uint32) * 0x9E3779B1
        bits = _murmur3(_murmur3(low ^ entry) ^ high)
        uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
        uniform = tl.minimum(uniform, 0.999999940395355)
        series = uniform * (1 + uniform * (0.5 + uniform * (1.0 / 3 + uniform * 0.25)))
        value -= tl.log(tl.where(uniform < 0.00390625, series, -tl.log(1 - uniform)))
        value = tl.where(inside, value, float("-inf"))
    top, place = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * num_blocks + block, top)
    tl.store(token + row * num_blocks + block, (block * BLOCK + place).to(tl.int64))


def draw_shard(
    logits_SV: torch.Tensor, keys_S: torch.Tensor, first: int, noise: bool, divisor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest perturbed logit fp32 [S], its index in the shard int64 [S]).

    logits_SV: contiguous rows of the vocabulary entries from `first` on, divided by `divisor` in
    fp32 as PyTorch divides on CUDA; keys_S: `token_keys`. Without `noise` the largest logit. Ties
    go to the lower index.
    """
    rows, vocab = logits_SV.shape
    num_blocks = triton.cdiv(vocab, BLOCK)
    best = torch.empty(rows, num_blocks, device=logits_SV.device)
    token = torch.empty(rows, num_blocks, dtype=torch.int64, device=logits_SV.device)
    _draw_kernel[(rows, num_blocks)](
        logits_SV, keys_S.contiguous(), best, token, vocab, first, logits_SV.stride(0), num_blocks,
        inverse_of(divisor), NOISE=noise, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    block_S = best.argmax(-1, keepdim=True)
    return best.gather(-1, block_S)[:, 0], token.gather(-1, block_S)[:, 0]
