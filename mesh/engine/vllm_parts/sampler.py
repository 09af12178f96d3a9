"""Our sampler in the place of vLLM's: the native engine's draw and the trainer's logprobs.

vLLM asks for a token of every scheduled sequence, also of one whose prompt is not through, and says
which of them it will not take. On CUDA it schedules a step before the tokens of the last one are
known, so a sequence that ended may be drawn for once more, and one that made room is drawn for
again: of two draws of one token the later counts. vLLM's own logprobs are not asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from vllm.v1.outputs import SamplerOutput

from mesh.engine.choice import choose
from mesh.engine.sampler import position_keys, sequence_keys
from mesh.engine.vllm_parts.requests import key_of
from mesh.types import Sampling


class Seats(NamedTuple):
    """What the rows of a batch are, which changes when a sequence comes or goes only."""

    names: list[str]
    keys_S: torch.Tensor
    prompt_lengths_S: torch.Tensor


class Step(NamedTuple):
    """What was drawn at once. indices: of the token in its response; -1: vLLM does not take it."""

    names: list[str]
    indices: np.ndarray
    tokens_S: torch.Tensor
    logprobs_S: torch.Tensor


class CounterSampler:
    """Owns the tokens and logprobs drawn since `start`. `runner`: vLLM's model runner.

    group: the ranks that hold a shard of the logits each; None: they come whole.
    """

    def __init__(self, runner: Any, group: dist.ProcessGroup | None) -> None:
        self.runner = runner
        self.group = group
        self.sampling: Sampling | None = None
        self.seats: Seats | None = None
        self.steps: list[Step] = []

    def start(self, sampling: Sampling) -> None:
        self.sampling, self.seats, self.steps = sampling, None, []

    def __call__(self, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        assert self.sampling is not None, "vLLM samples, but nobody asked"
        batch = self.runner.input_batch
        count = batch.num_reqs
        names = batch.req_ids[:count]
        if self.seats is None or names != self.seats.names:
            self.seats = self._seats(names, batch.num_prompt_tokens[:count], logits.device)
        seats = self.seats
        positions_S = self.runner.seq_lens[:count] - seats.prompt_lengths_S
        keys_S = position_keys(seats.keys_S, positions_S)
        tokens_S, logprobs_S = choose(logits, keys_S, self.sampling, self.group)
        lengths = self.runner.optimistic_seq_lens_cpu[:count].numpy()
        untaken = self.runner.discard_request_mask.np[:count]
        indices = np.where(untaken, -1, lengths - batch.num_prompt_tokens[:count])
        self.steps.append(Step(seats.names, indices, tokens_S, logprobs_S))
        return SamplerOutput(tokens_S.int()[:, None], logprobs_tensors=None)

    def _seats(self, names: list[str], prompt_lengths: np.ndarray, device: torch.device) -> Seats:
        assert self.sampling is not None
        keys_S = sequence_keys(self.sampling, torch.tensor([key_of(name) for name in names]))
        return Seats(names, keys_S.to(device), torch.tensor(prompt_lengths, device=device))

    def results(self) -> dict[str, tuple[list[int], list[float]]]:
        """(tokens, logprobs) drawn for every request since `start`, by its name."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        if not self.steps:
            return found
        tokens = torch.cat([step.tokens_S for step in self.steps]).tolist()
        logprobs = torch.cat([step.logprobs_S for step in self.steps]).tolist()
        rows = [
            row
            for step in self.steps
            for row in zip(step.names, step.indices.tolist(), strict=True)
        ]
        for (name, index), token, logprob in zip(rows, tokens, logprobs, strict=True):
            if index < 0:
                continue
            own_tokens, own_logprobs = found.setdefault(name, ([], []))
            assert index <= len(own_tokens), f"{name}: a token before {index} was not drawn"
            own_tokens[index:], own_logprobs[index:] = [token], [logprob]
        return found
