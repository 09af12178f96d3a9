"""Evaluation on held-out prompts: sampled pass@1 and pass@k, and greedy accuracy.

Part of a run and a program of its own (`recipes/evaluate.py`), through the same engine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mesh.roles.generator import EVAL_STEP, Generator, failed_scores
from mesh.tasks import numbered
from mesh.tasks.scorer import Scorer, TaskSource
from mesh.types import Prompt, Rollout


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out prompts of a task, drawn once, and how many samples of each (k of pass@k)."""

    source: TaskSource
    prompts: tuple[Prompt, ...]
    num_samples: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluate(
    held_out: EvaluationSet,
    generator: Generator,
    scorer: Scorer,
    cpu_group: dist.ProcessGroup,
    prefix: str = "eval",
) -> dict[str, float]:
    """The metrics `eval/*` of the generator's present weights, on every rank. Collective.

    A response counts as right when its reward is at least 1. The same prompts and random numbers at
    every call, whatever the step: curves compare like with like. A replica's share may be empty.
    """
    prompts, samples = numbered(held_out.prompts), held_out.num_samples
    sampled = generator.rollout(scorer, prompts, samples, generator.sampling(EVAL_STEP))
    greedy = generator.rollout(scorer, prompts, 1, generator.sampling(EVAL_STEP, temperature=0))
    ks = sorted({1, samples})
    sums = torch.tensor([*_sums(sampled, samples, ks), *_sums(greedy, 1, [1])], dtype=torch.float64)
    sums = sums if generator.speaks else torch.zeros_like(sums)
    dist.all_reduce(sums, group=cpu_group)
    *passes, sampled_prompts, greedy_passes, greedy_prompts = sums.tolist()
    assert sampled_prompts == greedy_prompts == len(prompts), "held-out prompts were lost"
    by_k = {k: value / len(prompts) for k, value in zip(ks, passes, strict=True)}
    metrics = {f"{prefix}/accuracy": by_k[1]}
    metrics |= {f"{prefix}/pass@{k}": value for k, value in by_k.items()}
    metrics[f"{prefix}/accuracy_greedy"] = greedy_passes / len(prompts)
    return metrics | failed_scores(scorer, f"{prefix}/failed", cpu_group)


def _sums(rollouts: list[Rollout], num_samples: int, ks: list[int]) -> list[float]:
    """Sum over prompts of pass@k for each k, then the number of prompts."""
    correct: dict[int, int] = defaultdict(int)
    for rollout in rollouts:
        correct[rollout.prompt_id] += rollout.reward >= 1.0
    return [
        *(sum(pass_at_k(num_samples, c, k) for c in correct.values()) for k in ks),
        len(correct),
    ]
