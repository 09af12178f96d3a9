"""The KL of whole rollouts to the reference, where it is part of their rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from mesh.rl.losses import DIVERGENCES
from mesh.rl.objective import Objective
from mesh.rl.step import Pass
from mesh.roles.passes import PassScores
from mesh.types import RolloutKey


def reward_divergences(
    passes: Sequence[Pass],
    scores: Sequence[PassScores],
    objective: Objective,
    group: dist.ProcessGroup,
) -> dict[RolloutKey, float] | None:
    """kl_coef times the KL of every rollout that a wave trains on, over all ranks of the trainer;
    None where rewards have none. group: the trainer's, on the CPU. A collective of the world, of
    which the others have no passes and take no part.
    """
    if objective.kl_in != "reward" or objective.kl_coef == 0 or dist.get_rank(group) < 0:
        return None
    mine: dict[RolloutKey, float] = {}
    for leaves, known in zip(passes, scores, strict=True):
        mine |= divergences(leaves, known, objective)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return {key: value for part in parts for key, value in part.items()}


def divergences(leaves: Pass, known: PassScores, objective: Objective) -> dict[RolloutKey, float]:
    """Of the rollouts of one pass: the estimate under the policy that sampled them, summed over
    their loss tokens. The sums are exactly rounded, so no packing changes a bit.
    """
    rollouts = [r for leaf in leaves for r in leaf.rollouts]
    if not rollouts:
        return {}
    assert known.reference_logprobs_A is not None, "the reference was not scored"
    policy_A = known.old_logprobs_A
    if policy_A is None:
        policy_A = torch.tensor([x for r in rollouts for x in r.logprobs], dtype=torch.float32)
    estimate = DIVERGENCES[objective.kl_estimator]
    values_A = estimate(policy_A.cpu().double(), known.reference_logprobs_A.cpu().double())
    values = iter(values_A.tolist())
    return {r.key: objective.kl_coef * math.fsum(islice(values, r.length)) for r in rollouts}
