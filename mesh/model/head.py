"""The model's head: the output projection fused with the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torchtitan.models.common.linear import Linear as TitanLinear

from mesh.model.divergence import HeadInputs
from mesh.model.logprobs import TaughtScores, TokenScores, taught_logprobs, token_logprobs
from mesh.model.parallel import local
from mesh.model.token_sets import TokenSets
from mesh.types import IdSpans


class LMHead(TitanLinear):
    """Output projection fused with the logprobs, so that [T, V] logits need not exist."""

    tp_dim = 0

    @dataclass(kw_only=True, slots=True)
    class Config(TitanLinear.Config):
        textless: IdSpans = ()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tp_group: dist.ProcessGroup | None = None
        self.textless = config.textless

    def forward(
        self,
        hidden_AD: torch.Tensor,
        targets_A: torch.Tensor | None,
        temperature: float,
        teacher: HeadInputs | None = None,
        sets: TokenSets | None = None,
    ) -> TokenScores | TaughtScores | HeadInputs:
        """Scores of the targets, beside a teacher where there is one, over truncated `sets` where
        they are given; without targets its own inputs."""
        weight, group, textless = local(self.weight), self.tp_group, self.textless
        if targets_A is None:
            return HeadInputs(hidden_AD, weight)
        if teacher is None:
            return token_logprobs(hidden_AD, weight, targets_A, temperature, group, textless, sets)
        return taught_logprobs(
            hidden_AD, weight, targets_A, temperature, group, textless, teacher, sets
        )
