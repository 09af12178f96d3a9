"""Statistics of a step: of its tokens, so that parts merge exactly, and of its rollouts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mesh.rl.advantages import equal_groups, lengths_of, rewards_of
from mesh.rl.rewards import LengthPenalty
from mesh.types import FINISH_REASONS, TRUNCATED, Outline, Parts, Wave


@dataclass(frozen=True)
class TokenStats:
    """Mergeable statistics of tokens: `sums` add, of `maxima` the largest stays.

    float64 on the tokens' device. `sums`: tokens, clipped tokens, |logprob difference|, ratio, KL.
    `maxima`: |logprob difference|, ratio. Two all-reduces (SUM, MAX) merge them over ranks.

    The KL is that of the policy from the old one, by k3 = ratio - 1 - log(ratio) (Schulman,
    "Approximating KL Divergence", 2020): on average KL(old || policy), as the old one drew the
    tokens.
    """

    sums: Tensor
    maxima: Tensor


def token_stats(
    logprobs_T: Tensor, generator_logprobs_T: Tensor, old_logprobs_T: Tensor, clipped_T: Tensor
) -> TokenStats:
    """Statistics of T tokens: the mismatch against the generator's logprobs, the ratio against the
    old ones. 0 tokens give the neutral element of `merge`.
    """
    mismatch_T = (logprobs_T - generator_logprobs_T).detach().to(torch.float64).abs()
    moved_T = (logprobs_T - old_logprobs_T).detach().to(torch.float64)
    ratio_T, kl_T = moved_T.exp(), torch.expm1(moved_T) - moved_T
    summed = (torch.ones_like(ratio_T), clipped_T.to(torch.float64), mismatch_T, ratio_T, kl_T)
    floor = ratio_T.new_zeros(1)
    largest = [torch.cat([x_T, floor]).amax() for x_T in (mismatch_T, ratio_T)]
    return TokenStats(torch.stack([x_T.sum() for x_T in summed]), torch.stack(largest))


def merge(one: TokenStats, other: TokenStats) -> TokenStats:
    """Statistics of the tokens of both."""
    return TokenStats(one.sums + other.sums, torch.maximum(one.maxima, other.maxima))


def stats_metrics(stats: TokenStats) -> dict[str, float]:
    """Metrics of the merged statistics, under the names of `metrics.jsonl`; 0 for no tokens."""
    num_tokens, num_clipped, mismatch, ratio, _ = stats.sums.tolist()
    mismatch_max, ratio_max = stats.maxima.tolist()
    count = max(num_tokens, 1.0)
    return {
        "logprob_diff/max": mismatch_max,
        "logprob_diff/mean": mismatch / count,
        "ratio/max": ratio_max,
        "ratio/mean": ratio / count,
        "clip_fraction": num_clipped / count,
    }


def approx_kl(stats: TokenStats) -> float:
    """Mean KL of the policy from the old one, of merged statistics; 0 for no tokens."""
    num_tokens, *_, divergence = stats.sums.tolist()
    return divergence / max(num_tokens, 1.0)


def part_means(scores: Iterable[Parts]) -> dict[str, float]:
    """The mean of each part over the scores that have it, whatever their order: sums are exactly
    rounded.
    """
    values: dict[str, list[float]] = {}
    for parts in scores:
        for name, value in parts:
            values.setdefault(name, []).append(value)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def score_metrics(outlines: Sequence[Outline]) -> dict[str, float]:
    """The means of the parts of scores, and the share of correct ones among those that say so."""
    means = part_means(o.parts for o in outlines)
    metrics = {f"reward/{name}": mean for name, mean in means.items()}
    said = [o.correct for o in outlines if o.correct is not None]
    return metrics | ({"reward/correct": sum(said) / len(said)} if said else {})


def rollout_metrics(
    waves: Sequence[Wave], group_size: int, penalty: LengthPenalty | None = None
) -> dict[str, float]:
    """Scores, lengths and truncation of a whole step's rollouts, and what long ones lose; empty off
    the trainer."""
    outlines = [o for wave in waves for o in wave.outlines]
    if not outlines:
        return {}
    rewards_PG = torch.cat([rewards_of(wave, group_size) for wave in waves])
    lengths = [o.length for o in outlines]
    unfinished = sum(o.finish_reason in TRUNCATED for o in outlines)
    truncated = sum(o.finish_reason != "stop" for o in outlines)
    return {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std()),
        "equal_groups": float(equal_groups(rewards_PG).double().mean()),
        "tokens/generated": float(sum(lengths)),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": float(max(lengths)),
        "response/truncated": unfinished / len(outlines),
        "truncated": truncated / len(outlines),
        **penalty_metrics(waves, group_size, penalty),
        **score_metrics(outlines),
        **turn_metrics(outlines),
    }


def penalty_metrics(
    waves: Sequence[Wave], group_size: int, penalty: LengthPenalty | None
) -> dict[str, float]:
    """The mean of what rollouts lose for their length, and the share of those that lose anything;
    nothing without a penalty."""
    if penalty is None:
        return {}
    taken_PG = torch.cat([penalty.of(lengths_of(wave, group_size)) for wave in waves])
    return {
        "length_penalty/mean": float(taken_PG.mean()),
        "length_penalty/share": float((taken_PG > 0).double().mean()),
    }


def turn_metrics(outlines: Sequence[Outline]) -> dict[str, float]:
    """Turns of the model, tokens of the replies, and why conversations ended; empty where there
    are none.
    """
    talks = [o for o in outlines if o.turns]
    if not talks:
        return {}
    ends = Counter(o.finish_reason for o in talks)
    return {
        "turns/mean": sum(o.turns for o in talks) / len(talks),
        "turns/max": float(max(o.turns for o in talks)),
        "tokens/replied": float(sum(o.replied for o in talks)),
        **{f"finish/{reason}": ends[reason] / len(talks) for reason in FINISH_REASONS},
    }
