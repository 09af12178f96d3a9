"""Sums that a step accumulates over its passes beside the gradients, and their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mesh.rl.statistics import TokenStats, merge, stats_metrics, token_stats
from mesh.roles.nonfinite import Trained


class StepSums:
    """One rank's sums of one step, on the device; only `metrics` waits for it.

    measured: names of what is logged even where no pass measured it. `trained` keeps what
    `nonfinite.py` needs of every pass to explain a bad step.
    """

    def __init__(self, device: torch.device, measured: Iterable[str] = ("entropy",)) -> None:
        nothing = torch.zeros(0, device=device)
        self.stats = token_stats(nothing, nothing, nothing, nothing.bool())
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # sums over tokens of what else is measured, by the name of its mean
        self.measured = {name: torch.zeros_like(self.loss) for name in measured}
        self.trained: list[Trained] = []
        self.tokens_due = 0

    def add(
        self, stats: TokenStats, loss: Tensor, measured: Mapping[str, Tensor], kept: Trained
    ) -> None:
        """A microbatch: its statistics, its weighted sum of losses, what is measured of its tokens,
        and what is kept."""
        self.stats = merge(self.stats, stats)
        self.loss += loss.detach().double()
        for name, x_T in measured.items():
            sums = self.measured.get(name, torch.zeros_like(self.loss))
            self.measured[name] = sums + x_T.detach().double().sum()
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
        return (~torch.stack([self.stats.sums[2], self.loss]).isfinite()).sum().double()

    def metrics(self, trainer_mesh: DeviceMesh, normaliser: float, tokens: int) -> dict[str, float]:
        """The step's metrics over all ranks, with the means over tokens of all that was measured.
        Reduces the sums: to be called once.

        tokens: loss tokens of the whole step; AssertionError where others were trained on.
        """
        names = sorted(self.measured)
        extra = torch.stack([self.loss, *(self.measured[name] for name in names)])
        for axis in ("dp_replicate", "dp_shard"):
            group = trainer_mesh.get_group(axis)
            for sums in (self.stats.sums, extra):
                dist.all_reduce(sums, group=group)
            dist.all_reduce(self.stats.maxima, op=dist.ReduceOp.MAX, group=group)
        trained = int(self.stats.sums[0])
        assert trained == tokens, f"{trained} loss tokens were trained on, {tokens} were due"
        loss, *measured = extra.tolist()
        means = {name: x / max(trained, 1) for name, x in zip(names, measured, strict=True)}
        return stats_metrics(self.stats) | {
            "tokens/trained": float(trained),
            "loss": loss / normaliser,
            **means,
        }
