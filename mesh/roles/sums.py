"""Sums that a step accumulates over its passes beside the gradients, and their metrics."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mesh.rl.statistics import TokenStats, merge, stats_metrics, token_stats
from mesh.roles.nonfinite import Trained


class StepSums:
    """One rank's sums of one step, on the device; only `metrics` waits for it.

    `trained` keeps what `nonfinite.py` needs of every pass to explain a bad step.
    """

    def __init__(self, device: torch.device) -> None:
        nothing = torch.zeros(0, device=device)
        self.stats = token_stats(nothing, nothing, nothing, nothing.bool())
        # sums over tokens of the loss (weighted), the entropy and the KL to the reference
        self.extra = torch.zeros(3, dtype=torch.float64, device=device)
        self.trained: list[Trained] = []
        self.tokens_due = 0

    def add(self, stats: TokenStats, extra: tuple[Tensor, Tensor, Tensor], kept: Trained) -> None:
        """A microbatch: its statistics, its sums of loss, entropy and KL, and what is kept."""
        self.stats = merge(self.stats, stats)
        self.extra += torch.stack([x.detach().double() for x in extra])
        self.trained.append(kept)

    def expect(self, tokens: int) -> None:
        """Add to the expected number of loss tokens; AssertionError if others were trained on."""
        self.tokens_due += tokens
        trained, due = int(self.stats.sums[0]), self.tokens_due
        assert trained == due, f"{trained} loss tokens were trained on, {due} were due"

    def bad(self) -> Tensor:
        """float64 scalar, above 0 where a logprob of either side or the loss is not finite: the sum
        of logprob differences, or that of losses, then is not.
        """
        return (~torch.stack([self.stats.sums[2], self.extra[0]]).isfinite()).sum().double()

    def metrics(self, trainer_mesh: DeviceMesh, normaliser: float, tokens: int) -> dict[str, float]:
        """The step's metrics over all ranks, `kl` always. Reduces the sums: to be called once.

        tokens: loss tokens of the whole step; AssertionError where others were trained on.
        """
        for axis in ("dp_replicate", "dp_shard"):
            group = trainer_mesh.get_group(axis)
            for sums in (self.stats.sums, self.extra):
                dist.all_reduce(sums, group=group)
            dist.all_reduce(self.stats.maxima, op=dist.ReduceOp.MAX, group=group)
        trained = int(self.stats.sums[0])
        assert trained == tokens, f"{trained} loss tokens were trained on, {tokens} were due"
        loss, entropy, divergence = self.extra.tolist()
        return stats_metrics(self.stats) | {
            "tokens/trained": float(trained),
            "loss": loss / normaliser,
            "entropy": entropy / max(trained, 1),
            "kl": divergence / max(trained, 1),
        }
