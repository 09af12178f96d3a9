"""From the scores of rollouts to the rewards that advantages are made of: what is taken off them.

Groups count as equal by their scores alone (`advantages.equal_groups`): a penalty makes no group
that has nothing to teach look as if it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mesh.rl.advantages import lengths_of, rewards_of
from mesh.types import RolloutKey, Wave


@dataclass(frozen=True)
class LengthPenalty:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), `most` times: 0 up to
    limit - tokens loss tokens, then a straight line down to -1 at `limit`, and -1 beyond.
    """

    most: float
    tokens: int
    limit: int

    def of(self, lengths: Tensor) -> Tensor:
        """float64: what is taken off the reward of a rollout of so many loss tokens."""
        beyond = lengths.to(torch.float64) - (self.limit - self.tokens)
        return self.most * (beyond / self.tokens).clamp(0, 1)


def shaped_rewards(
    wave: Wave,
    group_size: int,
    length_penalty: LengthPenalty | None = None,
    divergences: Mapping[RolloutKey, float] | None = None,
) -> Tensor:
    """float64 rewards_PG: scores, less the length penalty, less `divergences` (weighted)."""
    rewards_PG = rewards_of(wave, group_size)
    if length_penalty is not None:
        rewards_PG = rewards_PG - length_penalty.of(lengths_of(wave, group_size))
    if divergences is not None:
        # groups of equal scores that are left out were not scored by the reference
        left_out = {o.prompt_id for o in wave.outlines if o.key not in divergences}
        assert not left_out & {prompt_id for prompt_id, _ in divergences}, "half a group was scored"
        taken = [divergences.get(o.key, 0.0) for o in wave.outlines]
        rewards_PG = rewards_PG - torch.tensor(taken, dtype=torch.float64).view(rewards_PG.shape)
    return rewards_PG
