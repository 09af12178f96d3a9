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
from vllm.v1.outputs import SamplerOutput

from mesh.engine.sampler import sequence_keys
from mesh.engine.vllm.draws import Draws, Rows
from mesh.engine.vllm.requests import key_of
from mesh.types import Sampling


class Step(NamedTuple):
    """What was drawn at once. indices: of the token in its response; -1: vLLM does not take it."""

    names: list[str]
    indices: np.ndarray
    tokens_S: torch.Tensor
    logprobs_S: torch.Tensor


class CounterSampler:
    """Owns the tokens and logprobs drawn since `start`. `runner`: vLLM's model runner."""

    def __init__(self, runner: Any, draws: Draws) -> None:
        self.runner, self.draws = runner, draws
        lengths = runner.seq_lens
        self.places_2S = lengths.new_zeros(2, len(lengths), dtype=torch.int64)
        self.rows = Rows(self.places_2S[0], self.places_2S[1], lengths)
        self.sampling: Sampling | None = None
        self.keys: dict[str, int] = {}
        self.names: list[str] = []
        self.steps: list[Step] = []

    def start(self, sampling: Sampling, names: list[str]) -> None:
        """Before these requests are run."""
        self.sampling, self.names, self.steps = sampling, [], []
        ids_S2 = torch.tensor([key_of(name) for name in names], dtype=torch.int64).view(-1, 2)
        self.keys = dict(zip(names, sequence_keys(sampling, ids_S2).tolist(), strict=True))

    def __call__(self, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        """logits: what our `Draws` make of what the model gave, a row for each sequence."""
        assert self.sampling is not None, "vLLM samples, but nobody asked"
        batch = self.runner.input_batch
        count = batch.num_reqs
        prompt_lengths, names = batch.num_prompt_tokens[:count], batch.req_ids[:count]
        if names != self.names:
            self._seat(names, prompt_lengths)
        tokens_S, logprobs_S = self.draws(logits, self.rows, self.sampling)
        lengths = self.runner.optimistic_seq_lens_cpu[:count].numpy()
        untaken = self.runner.discard_request_mask.np[:count]
        indices = np.where(untaken, -1, lengths - prompt_lengths)
        self.steps.append(Step(self.names, indices, tokens_S, logprobs_S))
        return SamplerOutput(tokens_S.int()[:, None], logprobs_tensors=None)

    def _seat(self, names: list[str], prompt_lengths: np.ndarray) -> None:
        """Sequences have come, gone or moved. The device hears of it without the host waiting."""
        self.names = names
        places_2S = torch.tensor([[self.keys[name] for name in names], prompt_lengths.tolist()])
        if self.places_2S.is_cuda:
            places_2S = places_2S.pin_memory().to(self.places_2S.device, non_blocking=True)
        self.places_2S[:, : len(names)] = places_2S

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
