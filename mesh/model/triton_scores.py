"""Scores of vocabulary tiles on CUDA, read directly from the matmul's logits.

One program reads a row of a tile once, in blocks of fixed size, and keeps one sum per lane of the
block, rescaled as the running maximum grows (online softmax, arXiv:1805.02867); at the end
neighbouring lanes are added, then neighbouring pairs, and so on. The order of every sum is thus
explicit: no layout chosen by the compiler, and no other row or tile, can change a bit. Each product
and sum is rounded on its own (no fma contraction). The plain functions in `tiles`,
`tile_gradient` and `divergence` are the specification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from mesh.model.tile_gradient import DivergenceTerm, EntropyTerm

BLOCK = 2048  # fixes the order of the sums
WARPS = 4
COMBINED_ROWS = 64


@triton.jit
def _tree_sum(x, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """Sum the rows of [ROWS, 2 ** LEVELS] along a binary tree; two terms have only one order."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [ROWS, 2 ** (LEVELS - level - 1), 2]), 2)
    return tl.max(x, 1)  # the one column left


@triton.jit(do_not_specialize=["rows", "origin"])
def _score_kernel(
    logits, edges, targets, scores, rows, row_stride, origin, inverse,
    MOMENT: tl.constexpr, ALIGNED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score one row of one tile. Columns count from `logits`, targets from `origin`."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.multiple_of(tl.load(edges + tile), ALIGNED)
    last = tl.multiple_of(tl.load(edges + tile + 1), ALIGNED)
    logits += row * row_stride
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sum_of_z = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        z = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse
        top = tl.maximum(peak, tl.max(z, 0))
        rescale, p = tl.exp(peak - top), tl.exp(z - top)
        total = total * rescale + p
        if MOMENT:
            sum_of_z = sum_of_z * rescale + p * tl.where(inside, z, 0.0)
        peak = top
    mass = _tree_sum(tl.reshape(total, [1, BLOCK]), 1, LEVELS)
    to = scores + tile * 3 * rows + row + tl.arange(0, 1)
    tl.store(to, peak + tl.log(mass))
    if MOMENT:
        moment = _tree_sum(tl.reshape(sum_of_z, [1, BLOCK]), 1, LEVELS)
        tl.store(to + 2 * rows, moment / mass)
    target = tl.load(targets + row) - origin
    mine = (target >= first) & (target < last)
    logit = tl.load(logits + target, mask=mine, other=float("-inf")).to(tl.float32)
    tl.store(scores + (tile * 3 + 1) * rows + row, logit * inverse)


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    scores, outs, rows, TILES: tl.constexpr, LEVELS: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.arange(0, 2**LEVELS)[None]
    place = scores + tile.to(tl.int64) * 3 * rows + row[:, None]
    inside = (tile < TILES) & (row < rows)[:, None]
    of_tile = tl.load(place, mask=inside, other=float("-inf"))
    target = tl.max(tl.load(place + rows, mask=inside, other=float("-inf")), 1)
    peak = tl.max(of_tile, 1)
    terms = tl.exp(of_tile - peak[:, None])
    logsumexp = peak + tl.log(_tree_sum(terms, ROWS, LEVELS))
    tl.store(outs + row, target - logsumexp, mask=row < rows)
    tl.store(outs + 2 * rows + row, logsumexp, mask=row < rows)
    if ENTROPY:
        mean = tl.load(place + 2 * rows, mask=inside, other=0.0)
        means = _tree_sum(tl.exp(of_tile - logsumexp[:, None]) * mean, ROWS, LEVELS)
        tl.store(outs + rows + row, logsumexp - means, mask=row < rows)
    else:
        tl.store(outs + rows + row, tl.zeros([ROWS], tl.float32), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _divergence_kernel(
    logits, teacher, edges, scores, rows, row_stride, teacher_stride, inverse,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one row of the teacher's tile, and the mean of the difference of the logits
    under the softmax of the policy's. Columns count from `logits` and `teacher`."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(edges + tile), tl.load(edges + tile + 1)
    logits += row * row_stride
    teacher += row * teacher_stride
    peak = tl.full([], float("-inf"), tl.float32)
    peak_u = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    total_u = tl.zeros([BLOCK], tl.float32)
    sum_of_difference = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        z = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse
        u = tl.load(teacher + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse
        top, top_u = tl.maximum(peak, tl.max(z, 0)), tl.maximum(peak_u, tl.max(u, 0))
        rescale, p = tl.exp(peak - top), tl.exp(z - top)
        total = total * rescale + p
        total_u = total_u * tl.exp(peak_u - top_u) + tl.exp(u - top_u)
        difference = tl.where(inside, z, 0.0) - tl.where(inside, u, 0.0)
        sum_of_difference = sum_of_difference * rescale + p * difference
        peak, peak_u = top, top_u
    mass = _tree_sum(tl.reshape(total, [1, BLOCK]), 1, LEVELS)
    mass_u = _tree_sum(tl.reshape(total_u, [1, BLOCK]), 1, LEVELS)
    weighted = _tree_sum(tl.reshape(sum_of_difference, [1, BLOCK]), 1, LEVELS)
    to = scores + tile * 2 * rows + row + tl.arange(0, 1)
    tl.store(to, peak_u + tl.log(mass_u))
    tl.store(to + rows, weighted / mass)


@triton.jit(do_not_specialize=["origin"])
def _grad_kernel(
    logits, targets, logsumexp, scale, entropy, entropy_scale, teacher, teacher_logsumexp,
    divergence, divergence_scale, width, row_stride, teacher_stride, origin, inverse,
    ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row) - origin
    lse, by = tl.load(logsumexp + row), tl.load(scale + row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        z = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32) * inverse
        p = tl.exp(z - lse)
        grad = (tl.where(column == target, 1.0, 0.0) - p) * by
        if ENTROPY:
            surplus = z - lse + tl.load(entropy + row)
            grad -= p * surplus * tl.load(entropy_scale + row)
        if DIVERGENCE:
            place = teacher + row * teacher_stride + column
            u = tl.load(place, mask=inside, other=0.0).to(tl.float32) * inverse
            surplus = z - lse - (u - tl.load(teacher_logsumexp + row))
            surplus -= tl.load(divergence + row)
            grad += p * surplus * tl.load(divergence_scale + row)
        tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=inside)


@lru_cache
def inverse_of(temperature: float) -> float:
    """The fp32 factor with which PyTorch divides a CUDA tensor by a number."""
    return (1 / torch.tensor(temperature, dtype=torch.float32, device="cpu")).item()


@lru_cache
def _on_device(edges: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(edges, dtype=torch.int32, device=device)


def tile_scores(
    logits_AV: torch.Tensor,
    edges: Sequence[int],
    targets_A: torch.Tensor,
    temperature: float,
    with_moment: bool,
) -> torch.Tensor:
    """`logprobs.tile_scores`, [K, 3, A]. Without `with_moment` moments are left unwritten."""
    assert logits_AV.stride(-1) == 1, "logits must be contiguous over the vocabulary"
    rows, tiles = len(logits_AV), len(edges) - 1
    columns = tuple(edge - edges[0] for edge in edges)
    scores_K3A = logits_AV.new_empty(tiles, 3, rows, dtype=torch.float32)
    _score_kernel[(rows, tiles)](
        logits_AV, _on_device(columns, logits_AV.device), targets_A.contiguous(), scores_K3A, rows,
        logits_AV.stride(0), edges[0], inverse_of(temperature), MOMENT=with_moment,
        ALIGNED=math.gcd(16, *columns), LEVELS=BLOCK.bit_length() - 1, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return scores_K3A


def combine_scores(scores_K3A: torch.Tensor, with_entropy: bool) -> tuple[torch.Tensor, ...]:
    """`logprobs.combine_scores`, along the same tree of tiles."""
    tiles, _, rows = scores_K3A.shape
    outs = scores_K3A.new_empty(3, rows)
    _combine_kernel[(triton.cdiv(rows, COMBINED_ROWS),)](
        scores_K3A, outs, rows, TILES=tiles, LEVELS=(tiles - 1).bit_length(), ENTROPY=with_entropy,
        ROWS=COMBINED_ROWS, enable_fp_fusion=False,
    )  # fmt: skip
    return tuple(outs)


def tile_divergence(
    logits_AV: torch.Tensor, teacher_AV: torch.Tensor, edges: Sequence[int], temperature: float
) -> torch.Tensor:
    """`divergence.tile_divergence`, [K, 2, A]."""
    assert logits_AV.stride(-1) == teacher_AV.stride(-1) == 1, "logits must be contiguous"
    rows, tiles = len(logits_AV), len(edges) - 1
    columns = tuple(edge - edges[0] for edge in edges)
    scores_K2A = logits_AV.new_empty(tiles, 2, rows, dtype=torch.float32)
    _divergence_kernel[(rows, tiles)](
        logits_AV, teacher_AV, _on_device(columns, logits_AV.device), scores_K2A, rows,
        logits_AV.stride(0), teacher_AV.stride(0), inverse_of(temperature),
        LEVELS=BLOCK.bit_length() - 1, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return scores_K2A


def tile_gradient(
    logits_AV: torch.Tensor,
    first: int,
    targets_A: torch.Tensor,
    logsumexp_A: torch.Tensor,
    scale_A: torch.Tensor,
    temperature: float,
    entropy: EntropyTerm | None = None,
    divergence: DivergenceTerm | None = None,
) -> torch.Tensor:
    """`tile_gradient.tile_gradient`, in place of the logits."""
    assert logits_AV.stride(-1) == 1, "logits must be contiguous over the vocabulary"
    targets_A, unread = targets_A.contiguous(), logsumexp_A.contiguous()
    of_entropy = [unread] * 2 if entropy is None else [x.contiguous() for x in entropy]
    of_teacher, teacher_stride = [unread] * 4, 0
    if divergence is not None:
        teacher_stride = divergence.teacher_AV.stride(0)
        assert divergence.teacher_AV.stride(-1) == 1, "the teacher's logits must be contiguous"
        of_teacher = [divergence.teacher_AV, *(x.contiguous() for x in divergence[1:])]
    _grad_kernel[(len(logits_AV),)](
        logits_AV, targets_A, unread, scale_A.contiguous(), *of_entropy, *of_teacher,
        logits_AV.shape[1], logits_AV.stride(0), teacher_stride, first, inverse_of(temperature),
        ENTROPY=entropy is not None, DIVERGENCE=divergence is not None, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return logits_AV
