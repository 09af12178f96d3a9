"""Truncated sets over two shards of a vocabulary, and over one: `truncated_program.py DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_ranks

from mesh.engine.choice import choose, tile_logits
from mesh.invariant.switch import batch_invariant
from mesh.model.logprobs import token_logprobs
from mesh.model.token_sets import TokenSets
from mesh.types import Distribution, Sampling

ROWS, DIM, VOCAB, TEXTLESS = 40, 24, 128, ((0, 9), (98, 128))
DISTRIBUTIONS = [Distribution(0.8, 5), Distribution(0.8, 0, 0.7), Distribution(2.0, 90, 0.95)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scored(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sets: TokenSets, group
) -> list[torch.Tensor]:
    """Logprobs, entropies and gradients."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    at = sets.distribution.temperature
    scores = token_logprobs(*leaves, targets, at, group, TEXTLESS, sets)
    (scores.logprobs_A.sum() + scores.entropy_A.sum()).backward()
    return [*(x.detach() for x in scores), *(x.grad for x in leaves)]


def results(weight: torch.Tensor, other: torch.Tensor, group) -> list[dict[str, list]]:
    """Draws, then scores with the same weights and with others, over the same sets."""
    hidden, found = normal(ROWS, DIM), []
    for d in DISTRIBUTIONS:
        sampling = Sampling(d.temperature, 1, 0, 0, d.top_k, d.top_p, truncated_logprobs=True)
        logits = tile_logits(hidden, weight, group)
        drawn = choose(logits, torch.arange(ROWS) * 2**40, sampling, group, TEXTLESS)
        derived, kept = TokenSets(d), TokenSets(d, keeps=True)
        cases = [(weight, derived), (weight, kept), (weight, kept), (other, kept)]
        scores = [scored(hidden, w, drawn[0], sets, group) for w, sets in cases]
        found.append({"drawn": list(drawn), "scores": scores})
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    weight = normal(VOCAB, DIM, seed=1)
    other = weight + 0.2 * normal(VOCAB, DIM, seed=2)
    with batch_invariant(True, "cpu"):
        shards = [x.chunk(2)[dist.get_rank()].contiguous() for x in (weight, other)]
        found = {
            "sharded": results(*shards, dist.group.WORLD),
            "whole": results(weight, other, None),
        }
    torch.save(found, Path(sys.argv[1], f"{dist.get_rank()}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(2, main)
