"""The Triton versions of where a truncated set ends, and of the masking, against the plain ones.

Without a GPU, Triton's interpreter runs the kernels in a process of its own, as in
`test_triton_elementwise.py`. Sets are functions of the logits' bits, so all of them must be equal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mesh.model.truncated import Cut, mask_outside, masses, outside, plain_cut
from mesh.model.vocabulary import MASKED, mask_ids
from mesh.types import Distribution

DISTRIBUTIONS = [
    Distribution(t, k, p)
    for t in (0.7, 1.0)
    for k, p in ((1, 1.0), (7, 1.0), (0, 0.01), (0, 0.9), (0, 0.999999), (50, 0.8), (9999, 0.95))
]
WIDTH = 5000  # more than one block, and no multiple of it


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(dtype: torch.dtype) -> torch.Tensor:
    """Rows that are sharp, flat, full of ties, of one value, masked, and of zeros of both signs."""
    sharp, flat = 6 * normal(4, WIDTH), 0.01 * normal(2, WIDTH, seed=1)
    ties = (2 * normal(3, WIDTH, seed=2)).round()
    equal = torch.full((1, WIDTH), 3.25)
    masked = 3 * normal(2, WIDTH, seed=3)
    mask_ids(masked, ((0, 300), (4000, 5000)), 0)
    zeros = torch.tensor([0.0, -0.0]).repeat(1, WIDTH // 2)
    return torch.cat([sharp, flat, ties, equal, masked, zeros]).to(dtype)


def cuts(device: str, dtype: torch.dtype) -> list[Cut]:
    from mesh.model.triton_truncated import cut_of

    wide = F.pad(rows_of(dtype).to(device), (0, 9))  # rows further apart than they are long
    return [cut_of(wide[:, :WIDTH], one) for one in DISTRIBUTIONS]


def masked(device: str, dtype: torch.dtype, found: list[Cut]) -> list[torch.Tensor]:
    """The rows behind column 1003, as a shard of the vocabulary would mask them."""
    from mesh.model.triton_truncated import mask_outside

    pieces = [rows_of(dtype).to(device)[:, 1003:].contiguous() for _ in found]
    for piece, cut in zip(pieces, found, strict=True):
        mask_outside(piece, cut, 1003)
    return pieces


def results(device: str, dtype: torch.dtype) -> dict:
    found = cuts(device, dtype)
    return {"cuts": found, "masked": masked(device, dtype, found)}


def check(found: dict, dtype: torch.dtype) -> None:
    rows, sizes = rows_of(dtype), set()
    for distribution, cut, piece in zip(DISTRIBUTIONS, *found.values(), strict=True):
        cut, piece = Cut(*(x.cpu() for x in cut)), piece.cpu()
        plain = plain_cut(rows, distribution)
        assert torch.equal(cut.logit_A, plain.logit_A), distribution
        assert torch.equal(cut.id_A, plain.id_A), distribution
        sizes |= set((~outside(rows, cut, 0)).sum(-1).tolist())
        expected = rows[:, 1003:].contiguous()
        mask_outside(expected, plain, 1003)
        assert torch.equal(piece, expected)
    assert len(sizes) > 40 and 1 in sizes, "control: the sets have many sizes"


def test_the_kernels_in_the_interpreter(tmp_path: Path):
    path = tmp_path / "results.pt"
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check(torch.load(path, weights_only=False), torch.float32)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_on_cuda(dtype):
    check(results("cuda", dtype), dtype)


@needs_cuda
def test_masses_have_the_bits_of_the_cpu():
    logits, largest = 20 * normal(40, 5000), torch.full((40, 1), 60.0)
    ours = masses(logits.cuda(), largest.cuda(), 0.7)
    assert torch.equal(ours.cpu(), masses(logits, largest, 0.7))


@needs_cuda
@pytest.mark.parametrize("distribution", DISTRIBUTIONS[-4:], ids=str)
def test_sets_of_a_large_vocabulary_are_the_plain_ones_in_every_batch(distribution):
    from mesh.model.triton_truncated import cut_of

    logits = (4 * normal(300, 151936)).bfloat16()
    mask_ids(logits, ((151_669, 151_936),), 0)
    whole, plain = cut_of(logits.cuda(), distribution), plain_cut(logits, distribution)
    for ours, theirs in zip(whole, plain, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    for first, last in ((0, 1), (5, 8), (100, 300)):
        part = cut_of(logits[first:last].cuda(), distribution)
        assert all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))
    assert (plain.logit_A > MASKED).all()


if __name__ == "__main__":
    torch.save(results("cpu", torch.float32), sys.argv[1])
