"""Where the truncated set of a row ends, without sorting the row (Triton, CUDA).

One program reads its row some dozen times and bisects the logits, in the order of their bits: the
`top_k`-th by counting, the end of the nucleus by adding masses. Counts and masses are integers, so
no order of sums, batch or layout can change the result; each mass has the bits of
`truncated.masses` (no fma contraction). `truncated.plain_cut` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mesh.model import truncated
from mesh.model.truncated import Cut, scale_of
from mesh.model.vocabulary import MASKED
from mesh.types import Distribution

BLOCK = 4096
WARPS = 8

_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(c) for c in truncated.POWERS)
_FRACTION = tl.constexpr(truncated.FRACTION)
_SMALLEST = tl.constexpr(truncated.SMALLEST)


@triton.jit
def _keys(logit, SHIFT: tl.constexpr):
    """Integers in the order of the logits, equal where they are equal; bf16 needs the upper half of
    the bits."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return (ordered >> SHIFT).to(tl.int64)


@triton.jit
def _masses(logit, largest, scale):
    exponent = (logit - largest) * scale
    counted = exponent > _SMALLEST
    exponent = tl.where(counted, exponent, _SMALLEST)
    whole = tl.floor(exponent)
    rest = exponent - whole
    power = rest * _C5 + _C4
    power = power * rest + _C3
    power = power * rest + _C2
    power = power * rest + _C1
    power = power * rest + _C0
    mantissa = (power * 8388608.0).to(tl.int64) << (_FRACTION - 23)
    return tl.where(counted, mantissa >> (-whole).to(tl.int64), 0)


@triton.jit
def _loaded(logits, vocab, start, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    inside = column < vocab
    logit = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
    return column, inside, logit


@triton.jit
def _count_from(logits, vocab, key, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The number of logits at `key` or above."""
    found = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        _, inside, logit = _loaded(logits, vocab, start, BLOCK)
        found += (inside & (_keys(logit, SHIFT) >= key)).to(tl.int64)
    return tl.sum(found, 0)


@triton.jit
def _mass_from(logits, vocab, key, largest, scale, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the logits at `key` or above."""
    found = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        _, inside, logit = _loaded(logits, vocab, start, BLOCK)
        chosen = inside & (_keys(logit, SHIFT) >= key)
        found += tl.where(chosen, _masses(logit, largest, scale), 0)
    return tl.sum(found, 0)


@triton.jit
def _logit_at(logits, vocab, key, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The logit whose key this is."""
    found = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, inside, logit = _loaded(logits, vocab, start, BLOCK)
        same = inside & (_keys(logit, SHIFT) == key)
        found = tl.maximum(found, tl.where(same, logit, float("-inf")))
    return tl.max(found, 0)


@triton.jit
def _place_of(logits, vocab, key, number, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The column of the `number`-th logit, from the left, whose key this is."""
    before = tl.full([], 0, tl.int64)
    place = tl.full([], 0, tl.int64)
    for start in range(0, vocab, BLOCK):
        column, inside, logit = _loaded(logits, vocab, start, BLOCK)
        same = inside & (_keys(logit, SHIFT) == key)
        count = before + tl.cumsum(same.to(tl.int32), 0)
        place += tl.sum(tl.where(same & (count == number), column, 0), 0).to(tl.int64)
        before += tl.sum(same.to(tl.int64), 0)
    return place


@triton.jit(do_not_specialize=["top_k", "scale"])
def _cut_kernel(
    logits, out_logit, out_id, vocab, row_stride, top_k, top_p, scale,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """top_p: a float64 tensor of one entry."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    highest = tl.zeros([BLOCK], tl.int64)
    lowest = tl.full([BLOCK], 1 << 33, tl.int64)
    for start in range(0, vocab, BLOCK):
        _, inside, logit = _loaded(logits, vocab, start, BLOCK)
        key = _keys(logit, SHIFT)
        highest = tl.maximum(highest, tl.where(inside, key, 0))
        lowest = tl.minimum(lowest, tl.where(inside, key, 1 << 33))
    top = tl.max(highest, 0)
    low, number = tl.min(lowest, 0), top_k.to(tl.int64)
    if TOP_K:
        high = top + 1
        while high - low > 1:  # at least top_k at `low` or above, fewer at `high` or above
            middle = low + (high - low) // 2
            enough = _count_from(logits, vocab, middle, SHIFT, BLOCK) >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        number = top_k - _count_from(logits, vocab, low + 1, SHIFT, BLOCK)
    if TOP_P:
        largest = _logit_at(logits, vocab, top, SHIFT, BLOCK)
        if TOP_K:
            each = _masses(_logit_at(logits, vocab, low, SHIFT, BLOCK), largest, scale)
            total = _mass_from(logits, vocab, low + 1, largest, scale, SHIFT, BLOCK)
            total += number * each
        else:
            total = _mass_from(logits, vocab, low, largest, scale, SHIFT, BLOCK)
        wanted = tl.maximum((total.to(tl.float64) * tl.load(top_p)).to(tl.int64), 1)
        high = top + 1
        while high - low > 1:  # the mass from `low` on is enough, that from `high` on is not
            middle = low + (high - low) // 2
            mass = _mass_from(logits, vocab, middle, largest, scale, SHIFT, BLOCK)
            low = tl.where(mass >= wanted, middle, low)
            high = tl.where(mass >= wanted, high, middle)
        above = _mass_from(logits, vocab, low + 1, largest, scale, SHIFT, BLOCK)
        each = _masses(_logit_at(logits, vocab, low, SHIFT, BLOCK), largest, scale)
        number = (wanted - above + each - 1) // tl.maximum(each, 1)
    tl.store(out_logit + row, _logit_at(logits, vocab, low, SHIFT, BLOCK))
    tl.store(out_id + row, _place_of(logits, vocab, low, number, SHIFT, BLOCK))


def cut_of(logits_AV: torch.Tensor, distribution: Distribution) -> Cut:
    """`truncated.cut_of`."""
    assert logits_AV.stride(-1) == 1, "logits must be contiguous over the vocabulary"
    rows, vocab = logits_AV.shape
    cut = Cut(
        logits_AV.new_empty(rows, dtype=torch.float32), logits_AV.new_empty(rows, dtype=torch.int64)
    )
    share = torch.full((1,), distribution.top_p, dtype=torch.float64, device=logits_AV.device)
    _cut_kernel[(rows,)](
        logits_AV, *cut, vocab, logits_AV.stride(0), min(distribution.top_k, vocab), share,
        scale_of(distribution.temperature), TOP_K=0 < distribution.top_k < vocab,
        TOP_P=distribution.top_p < 1, SHIFT=16 if logits_AV.dtype == torch.bfloat16 else 0,
        BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return cut


@triton.jit(do_not_specialize=["first"])
def _mask_kernel(
    logits, last_logit, last_id, width, row_stride, first, masked, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * row_stride + column
    inside = column < width
    logit = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    last = tl.load(last_logit + row)
    behind = column + first > tl.load(last_id + row)
    outside = (logit < last) | ((logit == last) & behind)
    value = tl.full([BLOCK], masked, tl.float32).to(logits.dtype.element_ty)
    tl.store(place, value, mask=inside & outside)


def mask_outside(logits_AV: torch.Tensor, cut: Cut, first: int) -> None:
    """`truncated.mask_outside`."""
    assert logits_AV.stride(-1) == 1, "logits must be contiguous over the vocabulary"
    rows, width = logits_AV.shape
    _mask_kernel[(rows, triton.cdiv(width, BLOCK))](
        logits_AV, cut.logit_A.contiguous(), cut.id_A.contiguous(), width, logits_AV.stride(0),
        first, MASKED, BLOCK=BLOCK,
    )  # fmt: skip
