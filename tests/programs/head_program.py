"""Two gloo ranks that share the vocabulary of a head: `head_program.py DIR` writes what each saw.

Both take scores and gradients over their shards, batch-invariant, and rank 0 those of the whole
vocabulary by itself, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_ranks

from mesh.invariant.switch import batch_invariant
from mesh.model.divergence import HeadInputs
from mesh.model.logprobs import taught_logprobs
from mesh.model.vocabulary import MAX_TILE

ROWS, DIM, TEACHER_DIM = 11, 24, 40
TEXTLESS = {128: ((0, 17), (100, 128)), MAX_TILE + 8: ((3, 5000), (20_000, MAX_TILE + 8))}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scored(vocab_size: int, shard: slice, group: dist.ProcessGroup | None) -> dict:
    """Scores, and gradients of their weighted sums, by name."""
    hidden = normal(ROWS, DIM, seed=1).requires_grad_()
    weight = (normal(vocab_size, DIM, seed=2)[shard] * 0.4).requires_grad_()
    theirs = normal(vocab_size, TEACHER_DIM, seed=3)[shard] * 0.4
    teacher = HeadInputs(normal(ROWS, TEACHER_DIM, seed=4), theirs)
    targets = torch.linspace(20, 99, ROWS).long()
    scores = taught_logprobs(hidden, weight, targets, 0.7, group, TEXTLESS[vocab_size], teacher)
    upstream = [normal(ROWS, seed=seed) for seed in (5, 6, 7)]
    torch.autograd.backward(scores, upstream)
    found = {name: x.detach() for name, x in scores._asdict().items()}
    return found | {"hidden": hidden.grad, "weight": weight.grad}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, seen = dist.get_rank(), {}
    with batch_invariant(True, "cpu"):
        for size in TEXTLESS:
            half = size // 2
            shard = slice(rank * half, (rank + 1) * half)
            seen[size] = {
                "sharded": scored(size, shard, dist.group.WORLD),
                "whole": scored(size, slice(None), None),
            }
    torch.save(seen, Path(sys.argv[1], f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(2, main)
