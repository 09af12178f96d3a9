"""Triton's attention and its backward: their values, and that a sequence's bits are its own.

Without a GPU, Triton's interpreter runs the kernels (fp32, as it computes no bf16); it is switched
on for a process of its own, since it replaces every kernel that is defined while it is on.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

# name: lengths, heads, kv heads, head dim
PACKINGS = {
    "odd": ([1, 130, 7, 65], 2, 1, 32),
    "no groups": ([64, 33], 2, 2, 64),
    "groups of four": ([2, 70], 4, 1, 32),
    "groups of three": ([1, 35, 70], 6, 2, 64),
    "groups of seven": ([40], 7, 1, 32),
}
SCALE = 0.2


def bounds(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def inputs(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, device: str = "cpu"
) -> list[torch.Tensor]:
    """Random q, k, v and the gradient of the output, fp32."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = [(sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(s, generator=generator).to(device) for s in shape]


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification: attention of each sequence by itself, and its lse [N, T]."""
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    for start, end in pairwise(bounds(lengths).tolist()):
        keys, values = (x[start:end].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q[start:end], keys) * SCALE
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
        outs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def plain_forward(
    tensors: list[torch.Tensor], lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse in float64."""
    q, k, v, _ = (x.double() for x in tensors)
    return plain_attention(q, k, v, lengths)


def plain_backward(tensors: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """dQ, dK, dV in float64."""
    *leaves, grad_out = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    return torch.autograd.grad(plain_attention(*leaves, lengths)[0], leaves, grad_out)


def relative_errors(found: tuple, reference: tuple) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, reference, strict=True)]


def triton_backward(tensors: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Our dQ, dK, dV after the plain forward (CPU) or our own (CUDA)."""
    from mesh.invariant.triton_attention import attention_backward, varlen_attention

    q, k, v, grad_out = tensors
    cu_seqlens = bounds(lengths, q.device.type)
    if q.is_cuda:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, cu_seqlens, max(lengths), SCALE)
        return torch.autograd.grad(out, leaves, grad_out)
    out, lse = (x.float() for x in plain_attention(q.double(), k.double(), v.double(), lengths))
    return attention_backward(grad_out, q, k, v, out, lse, cu_seqlens, max(lengths), SCALE)


def as_views(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """q, k and v as parts of one fused tensor, as a joint projection makes them."""
    q, k, v, grad_out = tensors
    return [*torch.cat([q, k, v], 1).split([x.shape[1] for x in (q, k, v)], 1), grad_out]


def equal_alone_and_reordered(
    packed: tuple[torch.Tensor, ...], tensors: list[torch.Tensor], lengths: list[int]
) -> list[bool]:
    """For each of the `packed` gradients of each sequence: the same bits alone, and with the order
    of the sequences reversed?"""
    starts = bounds(lengths).tolist()
    spans = [slice(*pair) for pair in pairwise(starts)]
    turned = [torch.cat([x[span] for span in reversed(spans)]) for x in tensors]
    reverse = triton_backward(turned, lengths[::-1])
    found = []
    for span, length in zip(spans, lengths, strict=True):
        alone = triton_backward([x[span].clone() for x in tensors], [length])
        other = slice(starts[-1] - span.stop, starts[-1] - span.start)
        for a, b, c in zip(packed, alone, reverse, strict=True):
            found += [torch.equal(a[span], b), torch.equal(a[span], c[other])]
    return found


def triton_forward(
    tensors: list[torch.Tensor], lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    from mesh.invariant.triton_flash import attention_forward

    q, k, v, _ = tensors
    cu_seqlens = bounds(lengths, q.device.type)
    return attention_forward(q, k, v, cu_seqlens, max(lengths), SCALE, with_lse=True)


class Cache:
    """Keys and values of packed sequences in shuffled pages; NaN wherever there are none."""

    def __init__(self, tensors: list[torch.Tensor], lengths: list[int], page_size: int) -> None:
        self.queries, k, v, _ = tensors
        self.lengths, self.starts = lengths, bounds(lengths).tolist()
        pages = [-(-n // page_size) for n in lengths]
        order = iter(torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)))
        self.k, self.v = (
            x.new_full((sum(pages), page_size, *x.shape[1:]), math.nan) for x in (k, v)
        )
        self.table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for sequence, (start, end) in enumerate(pairwise(self.starts)):
            for page, first in enumerate(range(start, end, page_size)):
                place = self.table[sequence, page] = next(order)
                rows = slice(first, min(first + page_size, end))
                self.k[place, : rows.stop - first] = k[rows]
                self.v[place, : rows.stop - first] = v[rows]

    def attention(self, spans: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of spans (sequence, first query, end), and the packed rows that they are."""
        from mesh.invariant.triton_flash import attention_forward

        device = self.queries.device
        sizes = [end - first for _, first, end in spans]
        lengths = torch.tensor([end for *_, end in spans], dtype=torch.int32, device=device)
        table = self.table[[sequence for sequence, *_ in spans]].to(device)
        rows = [torch.arange(self.starts[i] + a, self.starts[i] + b) for i, a, b in spans]
        picked = torch.cat(rows).to(device)
        out, _ = attention_forward(
            self.queries[picked], self.k, self.v, bounds(sizes, device.type), max(sizes), SCALE,
            lengths, table,
        )  # fmt: skip
        return out, picked

    def batches(self, decoded: list[int]) -> Iterator[list[tuple[int, int, int]]]:
        """Whole prefills, last chunks of several sizes, and decode of these many sequences."""
        whole = [(i, 0, n) for i, n in enumerate(self.lengths)]
        yield whole
        for size in (1, 7, 70):
            yield [(i, max(0, n - size), n) for i, _, n in whole]
            yield [(i, min(3, n - 1), min(3 + size, n)) for i, _, n in whole]
        longest = self.lengths.index(max(self.lengths))
        edges = [1, 63, 64, 65, 128, 255, 256, 257, 2047, 2048]
        ends = [n for n in edges if n <= max(self.lengths)]
        for count in decoded:
            drawn = torch.randint(1, max(self.lengths) + 1, (count,)).tolist()
            yield [(longest, end - 1, end) for end in (ends + drawn)[:count]]


def forward_comparisons(
    tensors: list[torch.Tensor],
    lengths: list[int],
    page_size: int,
    decoded: list[int],
    tiles: list[tuple[int, int, int]],
) -> Iterator[tuple[str, bool]]:
    """What is compared with the rows of all sequences packed, and whether the bits are the same."""
    from mesh.invariant.triton_flash import TILES, Tile

    packed = triton_forward(tensors, lengths)
    spans = [slice(*pair) for pair in pairwise(bounds(lengths).tolist())]
    yield "views", torch.equal(triton_forward(as_views(tensors), lengths)[0], packed[0])
    for span, length in zip(spans, lengths, strict=True):
        out, lse = triton_forward([x[span].clone() for x in tensors], [length])
        yield "alone", torch.equal(out, packed[0][span])
        yield "lse alone", torch.equal(lse, packed[1][:, span])
    turned = torch.cat([torch.arange(span.start, span.stop) for span in reversed(spans)])
    out, lse = triton_forward([x[turned.to(x.device)] for x in tensors], lengths[::-1])
    yield "reordered", torch.equal(out, packed[0][turned])
    yield "lse reordered", torch.equal(lse, packed[1][:, turned])
    cache = Cache(tensors, lengths, page_size)
    for batch in cache.batches(decoded):
        out, rows = cache.attention(batch)
        yield f"{len(batch)} spans from {batch[0]} on", torch.equal(out, packed[0][rows])
    usual = dict(TILES)
    for tile in tiles:
        TILES.update(dict.fromkeys(TILES, (Tile(*tile),)))
        out, lse = triton_forward(tensors, lengths)
        TILES.update(usual)
        yield f"tile {tile}", torch.equal(out, packed[0])
        yield f"lse of tile {tile}", torch.equal(lse, packed[1])


@contextmanager
def products_row_by_row() -> Iterator[None]:
    """The interpreter's products are numpy's, whose rows depend on how many there are."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def product(self, a, b, total, *_):
        rows = [np.matmul(row[None], b.data)[0] for row in a.data]
        return TensorHandle(np.stack(rows) + total.data, total.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", product):
        yield


def report_of_the_interpreter() -> dict[str, dict]:
    """What the process with the interpreter on finds, by packing."""
    found = {}
    for name, (lengths, *shape) in PACKINGS.items():
        tensors = inputs(lengths, *shape)
        packed = triton_backward(as_views(tensors), lengths)
        forward = triton_forward(tensors, lengths)
        with products_row_by_row():
            tiles = [(16, 4, 2), (128, 8, 2)]  # the interpreter knows no warps and no stages
            comparisons = list(forward_comparisons(tensors, lengths, 128, [1, 9], tiles))
        found[name] = {
            "errors": relative_errors(packed, plain_backward(tensors, lengths)),
            "forward errors": relative_errors(forward, plain_forward(tensors, lengths)),
            "equal": equal_alone_and_reordered(packed, tensors, lengths),
            "forward": len(comparisons),
            "forward differs": [what for what, same in comparisons if not same],
        }
    return found


def test_the_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() == PACKINGS.keys()
    assert [max(found["errors"]) < 1e-6 for found in report.values()] == [True] * len(PACKINGS)
    equal = [same for found in report.values() for same in found["equal"]]
    assert len(equal) == sum(6 * len(lengths) for lengths, *_ in PACKINGS.values()) == 72
    assert all(equal)
    errors = [max(found["forward errors"]) for found in report.values()]
    assert [error < 1e-6 for error in errors] == [True] * len(PACKINGS)
    assert {name: found["forward differs"] for name, found in report.items()} == {
        name: [] for name in PACKINGS
    }
    compared = [found["forward"] for found in report.values()]
    assert compared == [2 * len(lengths) + 16 for lengths, *_ in PACKINGS.values()]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA_SHAPES = [(16, 8, 128), (8, 1, 128), (8, 2, 128), (4, 4, 64), (6, 2, 64)]
CUDA_LENGTHS = [333, 1, 512, 77, 1500, 130, 128, 5]


def cuda_inputs(shape: tuple[int, int, int]) -> list[torch.Tensor]:
    return [x.bfloat16() for x in inputs(CUDA_LENGTHS, *shape, "cuda")]


def flash_attention(tensors: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """PyTorch's own, with one split."""
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = bounds(lengths, "cuda"), max(lengths)
    out = varlen_attn(
        *tensors[:3], cu_seqlens, cu_seqlens, longest, longest,
        scale=SCALE, window_size=(-1, 0), enable_gqa=True, num_splits=1,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


@needs_cuda
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_the_output_on_cuda_is_as_close_to_the_truth_as_that_of_flash_attention(shape):
    from mesh.invariant.triton_attention import varlen_attention

    tensors = cuda_inputs(shape)
    out, lse = triton_forward(tensors, CUDA_LENGTHS)
    cu_seqlens = bounds(CUDA_LENGTHS, "cuda")
    same = varlen_attention(*tensors[:3], cu_seqlens, max(CUDA_LENGTHS), SCALE)
    assert torch.equal(out, same)
    reference = plain_forward(tensors, CUDA_LENGTHS)
    ours = relative_errors((out, lse), reference)
    theirs = relative_errors((flash_attention(tensors, CUDA_LENGTHS),), reference[:1])
    assert ours[0] < 1.2 * theirs[0], (ours, theirs)
    assert ours[1] < 1e-5


@needs_cuda
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_a_query_on_cuda_has_the_same_bits_in_training_prefill_and_decode_every_time(shape):
    lengths = [333, 1, 255, 256, 257, 2048, 77, 130, 64, 5]
    tensors = [x.bfloat16() for x in inputs(lengths, *shape, "cuda")]
    decoded = [1, 2, 3, 8, 17, 64, 129, 257]
    tiles = [(16, 4, 2), (16, 8, 3), (32, 4, 2), (64, 4, 3), (128, 8, 2)]
    found = list(forward_comparisons(tensors, lengths, 256, decoded, tiles))
    packed = triton_forward(tensors, lengths)
    for _ in range(20):
        again = triton_forward(tensors, lengths)
        found += [("again", torch.equal(a, b)) for a, b in zip(packed, again, strict=True)]
    assert [what for what, same in found if not same] == []
    assert len(found) == 2 * len(lengths) + 20 + len(decoded) + 40


@needs_cuda
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_gradients_on_cuda_are_as_close_to_the_truth_as_those_of_flash_attention(shape):
    tensors = cuda_inputs(shape)
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = flash_attention(leaves, CUDA_LENGTHS)
    flash = torch.autograd.grad(out, leaves, tensors[3])
    reference = plain_backward(tensors, CUDA_LENGTHS)
    ours = relative_errors(triton_backward(tensors, CUDA_LENGTHS), reference)
    theirs = relative_errors(flash, reference)
    assert max(ours) < 1e-2
    assert all(a < 1.1 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@needs_cuda
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_gradients_on_cuda_have_the_bits_of_their_sequence_every_time(shape):
    tensors = cuda_inputs(shape)
    first = triton_backward(as_views(tensors), CUDA_LENGTHS)
    equal = equal_alone_and_reordered(first, tensors, CUDA_LENGTHS)
    for _ in range(20):
        again = triton_backward(tensors, CUDA_LENGTHS)
        equal += [torch.equal(a, b) for a, b in zip(first, again, strict=True)]
    assert len(equal) == 6 * len(CUDA_LENGTHS) + 60
    assert all(equal)


if __name__ == "__main__":
    print(json.dumps(report_of_the_interpreter()))
