"""The Triton backward of packed attention: its values, and that a sequence's bits are its own.

Without a GPU, Triton's interpreter runs the kernels (fp32, as it computes no bf16); it is switched
on for a process of its own, since it replaces every kernel that is defined while it is on.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch

# name: lengths, heads, kv heads, head dim
PACKINGS = {
    "odd": ([1, 130, 7, 65], 2, 1, 32),
    "no groups": ([64, 33], 2, 2, 64),
    "groups of four": ([2, 70], 4, 1, 32),
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


def plain_backward(tensors: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """dQ, dK, dV in float64."""
    *leaves, grad_out = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    return torch.autograd.grad(plain_attention(*leaves, lengths)[0], leaves, grad_out)


def relative_errors(found: tuple, reference: tuple) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, reference, strict=True)]


def triton_backward(tensors: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Our dQ, dK, dV after the plain forward (CPU) or FlashAttention's (CUDA)."""
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


def report_of_the_interpreter() -> dict[str, dict]:
    """What the process with the interpreter on finds, by packing."""
    found = {}
    for name, (lengths, *shape) in PACKINGS.items():
        tensors = inputs(lengths, *shape)
        packed = triton_backward(as_views(tensors), lengths)
        found[name] = {
            "errors": relative_errors(packed, plain_backward(tensors, lengths)),
            "equal": equal_alone_and_reordered(packed, tensors, lengths),
        }
    return found


def test_the_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() == PACKINGS.keys()
    assert [max(found["errors"]) < 1e-6 for found in report.values()] == [True] * len(PACKINGS)
    equal = [same for found in report.values() for same in found["equal"]]
    assert len(equal) == sum(6 * len(lengths) for lengths, *_ in PACKINGS.values()) == 48
    assert all(equal)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA_SHAPES = [(16, 8, 128), (8, 1, 128), (4, 4, 64), (6, 2, 64)]
CUDA_LENGTHS = [333, 1, 512, 77, 1500, 130, 128, 5]


def cuda_inputs(shape: tuple[int, int, int]) -> list[torch.Tensor]:
    return [x.bfloat16() for x in inputs(CUDA_LENGTHS, *shape, "cuda")]


@needs_cuda
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_gradients_on_cuda_are_those_of_flash_attention_and_closer_to_the_truth(shape):
    from torch.nn.attention.varlen import varlen_attn

    from mesh.invariant.triton_attention import varlen_attention

    tensors = cuda_inputs(shape)
    cu_seqlens, longest = bounds(CUDA_LENGTHS, "cuda"), max(CUDA_LENGTHS)
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = varlen_attn(
        *leaves, cu_seqlens, cu_seqlens, longest, longest,
        scale=SCALE, window_size=(-1, 0), enable_gqa=True, num_splits=1,
    )  # fmt: skip
    assert torch.equal(varlen_attention(*leaves, cu_seqlens, longest, SCALE), out)
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
