"""Evaluation on held-out prompts: sampled pass@1 and pass@k, greedy accuracy, and mean reward.

Part of a run and a program of its own (`recipes/evaluate.py`), through the same engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from mesh.rl.statistics import part_means
from mesh.roles.generator import EVAL_STEP, Generator, failed_scores
from mesh.tasks import Task, numbered
from mesh.tasks.calls import TaskSource
from mesh.tasks.correct import METHOD, correctness_rule, is_correct
from mesh.tasks.scorer import Scorer
from mesh.types import Parts, Prompt, Rollout


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


def metric_names(num_samples: int, prefix: str = "eval") -> list[str]:
    """Metrics of an evaluation, of all of which more is better."""
    passes = [f"{prefix}/pass@{k}" for k in _ks(num_samples)]
    return [f"{prefix}/accuracy", *passes, f"{prefix}/accuracy_greedy", f"{prefix}/reward"]


def evaluate(
    held_out: EvaluationSet,
    generator: Generator,
    scorer: Scorer,
    cpu_group: dist.ProcessGroup,
    prefix: str = "eval",
) -> dict[str, float]:
    """The metrics `eval/*` of the generator's present weights, on every rank. Collective.

    `eval/reward` is the mean reward of the sampled responses, `eval/reward/NAME` that of a part of
    their scores; the others count responses that are correct. The same prompts and random numbers
    at every call, whatever the step: curves compare like with like. A replica's share may be empty.
    The layout changes no bit.
    """
    prompts, samples = numbered(held_out.prompts), held_out.num_samples
    sampled = generator.rollout(scorer, prompts, samples, generator.sampling(EVAL_STEP))
    greedy = generator.rollout(scorer, prompts, 1, generator.sampling(EVAL_STEP, temperature=0))
    table_PGC = answer_table(held_out, sampled, greedy)
    table_PGC = table_PGC if generator.speaks else torch.zeros_like(table_PGC)
    dist.all_reduce(table_PGC, group=cpu_group)
    counts_PG, rewards_PG, correct_PG = table_PGC.unbind(-1)
    assert (counts_PG == 1).all(), "held-out prompts were lost, or answered twice"
    parts, ruled = shared_scores(sampled if generator.speaks else [], cpu_group)
    nothing = ruled and not correct_PG.any() and rewards_PG.min() < rewards_PG.max()
    if nothing and not scorer.warned:
        scorer.warned = True
        if dist.get_rank() == 0:
            print(none_correct(held_out.source.task, float(rewards_PG.max()), prefix), flush=True)
    metrics = metrics_of(rewards_PG, correct_PG, prefix)
    metrics |= {f"{prefix}/reward/{name}": mean for name, mean in part_means(parts).items()}
    return metrics | failed_scores(scorer, f"{prefix}/failed", cpu_group)


def shared_scores(
    sampled: Sequence[Rollout], cpu_group: dist.ProcessGroup
) -> tuple[list[Parts], bool]:
    """The parts of all replicas' scores, and whether a score leaves it to a rule if it is correct.
    Collective.
    """
    mine = [r.parts for r in sampled if r.parts], any(r.correct is None for r in sampled)
    shares: list[tuple[list[Parts], bool]] = [([], False)] * dist.get_world_size(cpu_group)
    dist.all_gather_object(shares, mine, group=cpu_group)
    return [parts for found, _ in shares for parts in found], any(ruled for _, ruled in shares)


def answer_table(
    held_out: EvaluationSet, sampled: Sequence[Rollout], greedy: Sequence[Rollout]
) -> torch.Tensor:
    """float64 table_PGC: for each answer, the greedy one behind the samples of its prompt, 1, its
    reward, and 1 if it is correct. 0 where the rollouts are another replica's: tables add up.
    """
    last = held_out.num_samples
    rows = [[(0.0, 0.0, 0.0)] * (last + 1) for _ in range(len(held_out.prompts))]
    for rollout in (*sampled, *(replace(r, sample_id=last) for r in greedy)):
        correct = is_correct(held_out.source.task, rollout.reward, rollout.correct)
        rows[rollout.prompt_id][rollout.sample_id] = (1.0, rollout.reward, float(correct))
    return torch.tensor(rows, dtype=torch.float64)


def metrics_of(
    rewards_PG: torch.Tensor, correct_PG: torch.Tensor, prefix: str = "eval"
) -> dict[str, float]:
    """The metrics of an evaluation, from its whole table's columns. Sums are exactly rounded."""
    num_prompts, samples = len(rewards_PG), rewards_PG.shape[1] - 1
    counts = [int(count) for count in correct_PG[:, :-1].sum(1).tolist()]
    by_k = {
        k: math.fsum(pass_at_k(samples, count, k) for count in counts) / num_prompts
        for k in _ks(samples)
    }
    greedy = float(correct_PG[:, -1].sum()) / num_prompts
    reward = math.fsum(rewards_PG[:, :-1].flatten().tolist()) / (num_prompts * samples)
    values = [by_k[1], *by_k.values(), greedy, reward]
    return dict(zip(metric_names(samples, prefix), values, strict=True))


def none_correct(task: Task, largest: float, prefix: str) -> str:
    """The warning that rewards differ and yet no response was correct."""
    remedy = (
        "look at that method"
        if hasattr(task, METHOD)
        else f"if less is right, give the task a method {METHOD}(reward) -> bool, or return "
        "Score(reward, correct=...)"
    )
    return (
        f"warning: {prefix}: no response was correct, though rewards differ, up to {largest:g}: a "
        f"response is correct where {correctness_rule(task)}; {remedy}. The best model may follow "
        f"another metric: checkpoint.best_metric={prefix}/reward"
    )


def _ks(num_samples: int) -> list[int]:
    return sorted({1, num_samples})
