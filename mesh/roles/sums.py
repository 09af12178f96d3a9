"""Sums that an update accumulates over its passes beside the gradients, and their metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mesh.rl.statistics import TokenStats, approx_kl, merge, stats_metrics, token_stats
from mesh.roles.nonfinite import Trained

MISMATCH = "logprob_diff/"


class StepSums:
    """One rank's sums of one update, on the device; only what is reduced waits for it.

    measured: names of what is logged even where no pass measured it. `trained` keeps what
    `nonfinite.py` needs of every pass to explain a bad update. `before`: statistics of all tokens
    of the step, where these were scored before its first update.
    """

    def __init__(self, device: torch.device, measured: Iterable[str] = ("entropy",)) -> None:
        nothing = torch.zeros(0, device=device)
        self.stats = token_stats(nothing, nothing, nothing, nothing.bool())
        self.before: TokenStats | None = None
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # sums over tokens of what else is measured, by the name of its mean
        self.measured = {name: torch.zeros_like(self.loss) for name in measured}
        self.trained: list[Trained] = []
        self.tokens_due = 0
        self._reduced = False

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

    def add_before(self, stats: TokenStats) -> None:
        """The statistics of a pass that was scored before the step's first update."""
        self.before = stats if self.before is None else merge(self.before, stats)

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

    def reduce(self, trainer_mesh: DeviceMesh) -> None:
        """Make them those of all ranks; once, however often it is asked for. Collective."""
        if self._reduced:
            return
        names = sorted(self.measured)
        extra = torch.stack([self.loss, *(self.measured[name] for name in names)])
        parts = [self.stats] if self.before is None else [self.stats, self.before]
        for axis in ("dp_replicate", "dp_shard"):
            group = trainer_mesh.get_group(axis)
            for sums in (*(part.sums for part in parts), extra):
                dist.all_reduce(sums, group=group)
            for part in parts:
                dist.all_reduce(part.maxima, op=dist.ReduceOp.MAX, group=group)
        self.loss, *measured = extra
        self.measured = dict(zip(names, measured, strict=True))
        self._reduced = True

    def ratios(self) -> dict[str, float]:
        """How far the policy has moved from the old one, as reduced."""
        moved = stats_metrics(self.stats)
        kept = {name: value for name, value in moved.items() if not name.startswith(MISMATCH)}
        return kept | {"approx_kl": approx_kl(self.stats)}

    def metrics(self, normaliser: float, tokens: int) -> dict[str, float]:
        """The update's metrics, as reduced, with the means over tokens of all that was measured.

        tokens: loss tokens of the whole update; AssertionError where others were trained on.
        """
        trained = int(self.stats.sums[0])
        assert trained == tokens, f"{trained} loss tokens were trained on, {tokens} were due"
        metrics = stats_metrics(self.stats) | {"approx_kl": approx_kl(self.stats)}
        if self.before is not None:
            first = stats_metrics(self.before)
            metrics |= {name: first[name] for name in first if name.startswith(MISMATCH)}
        names = sorted(self.measured)
        sums = torch.stack([self.loss, *(self.measured[name] for name in names)])
        loss, *measured = sums.tolist()
        means = {name: x / max(trained, 1) for name, x in zip(names, measured, strict=True)}
        return metrics | {
            "tokens/trained": float(trained),
            "loss": loss / normaliser,
            **means,
        }


def largest(value: float, group: dist.ProcessGroup) -> float:
    """The largest of the ranks' values, infinite where one is not finite. Collective of `group`.

    For a number that decides what ranks do. Sums that were reduced over other axes of a mesh are
    equal up to rounding only.
    """
    found = torch.tensor(value if math.isfinite(value) else math.inf, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return float(found)
