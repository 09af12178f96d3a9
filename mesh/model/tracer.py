"""Module hooks that record the rows of one sequence over several forward passes.

Names are torchtitan's parameter names without `.weight`; operations that are not modules are named
alike: `rope.query`, `rope.key`, `swiglu`, and `lm_head` for the logprobs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mesh.model.attention import PackedAttention
from mesh.model.head import LMHead
from mesh.model.layers import (
    ColumnLinear,
    Embedding,
    FeedForward,
    HeadRMSNorm,
    RMSNorm,
    Rotary,
    RowLinear,
    TransformerBlock,
)
from mesh.model.policy import Policy, parameter_names
from mesh.model.tiles import shard_of

SHARDED = (ColumnLinear, HeadRMSNorm, PackedAttention, Rotary)  # features are sharded over tp
REPLICATED = (Embedding, LMHead, RMSNorm, RowLinear, TransformerBlock)
LOGPROBS = "lm_head"

Rows = Sequence[tuple[int, int]]
"""(row of a forward pass's output, position in the sequence)"""


class ModuleTracer:
    """Owns the recorded rows. group: the model's tp ranks, which all trace alike; None: one rank.

    `positions`: the position in the sequence of each recorded row, by module.
    """

    def __init__(self, model: Policy, group: dist.ProcessGroup | None) -> None:
        self.model = model
        self.group = group
        self.positions: dict[str, list[int]] = defaultdict(list)
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._present: dict[str, list[Tensor]] = defaultdict(list)
        self._sharded: set[str] = set()
        self._tokens: Rows = []
        self._scores: Rows = []

    def expect(self, tokens: Rows, scores: Rows = ()) -> None:
        """Select the rows to record from the next forward pass: of its tokens and its logprobs."""
        self._tokens, self._scores = tokens, scores

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Record forward passes inside the block."""
        handles = []
        for wrapped, module in self.model.named_modules():
            name = parameter_names(wrapped + ".").removesuffix(".")
            if isinstance(module, FeedForward):
                gated = partial(self._take_input, f"{name}.swiglu")
                handles.append(module.w2.register_forward_pre_hook(gated))
            elif isinstance(module, SHARDED + REPLICATED):
                handles.append(module.register_forward_hook(partial(self._take_output, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take_input(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._take(name, inputs[0], sharded=True)

    def _take_output(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, LMHead):
            if self._scores:
                self.keep(name, *_select(output.logprobs_A[:, None], self._scores))
        elif isinstance(module, Rotary):
            for part, rotated in zip(("query", "key"), output, strict=True):
                self._take(f"{name}.{part}", rotated, sharded=True)
        else:
            # with sequence parallelism a rank holds its shard of the tokens
            by_token = getattr(module, "token_group", None) is not None
            shard = shard_of(self.group)[0] * by_token
            self._take(name, output, isinstance(module, SHARDED), shard)

    def _take(self, name: str, output: Tensor, sharded: bool, shard: int = 0) -> None:
        """output: [T, width], or packed activations [1, T, ...]."""
        if not self._tokens:
            return
        if sharded:
            self._sharded.add(name)
        x_TF = output if output.ndim == 2 else output[0].flatten(1)
        self.keep(name, *_select(x_TF, self._tokens, first=shard * len(x_TF)))

    def keep(
        self, name: str, rows: Tensor, positions: Sequence[int], present: Tensor | None = None
    ) -> None:
        """Append rows of a module. `present`: mask of those this rank holds; the rest are void."""
        self._rows[name].append(rows.detach().cpu())
        self._present[name].append(torch.ones(len(rows)) > 0 if present is None else present)
        self.positions[name] += positions

    def outputs(self) -> dict[str, Tensor]:
        """Rows [R, width] of each module in execution order, assembled from the tp ranks, on the
        CPU. Collective over them.
        """
        return {
            name: self._assemble(
                torch.cat(rows), torch.cat(self._present[name]), name in self._sharded
            )
            for name, rows in self._rows.items()
        }

    def _assemble(self, rows: Tensor, present: Tensor, sharded: bool) -> Tensor:
        if self.group is None:
            return rows
        parts = self._gather(rows)
        if sharded:
            return torch.cat(parts, -1)
        owner_R = torch.stack(self._gather(present.byte())).argmax(0)  # the first that holds it
        return torch.stack(parts)[owner_R, torch.arange(len(rows))]

    def _gather(self, x: Tensor) -> list[Tensor]:
        """All tp ranks' tensors, by rank."""
        mine = x.to(next(self.model.parameters()).device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        return [part.cpu() for part in parts]


def _select(x: Tensor, rows: Rows, first: int = 0) -> tuple[Tensor, list[int], Tensor]:
    """(rows, positions, present) of an output whose first row has index `first`."""
    index = torch.tensor([row for row, _ in rows], dtype=torch.int64) - first
    present = (index >= 0) & (index < len(x))
    kept = x[torch.where(present, index, 0).to(x.device)]
    return kept, [position for _, position in rows], present
