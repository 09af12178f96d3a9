"""Our sampler in the place of vLLM's: the native engine's draw and the trainer's logprobs.

vLLM samples a token for every scheduled sequence, also for one that is amid its prompt, and says
which of them it discards. On CUDA it schedules a step before the tokens of the last one are known,
so a token beyond the end of a sequence may be drawn, and a token of a preempted sequence twice: the
later draw counts. vLLM's own logprobs are not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput

from mesh.engine.base import Row
from mesh.engine.sampler import sequence_keys
from mesh.engine.vllm.draws import DrawBuffers, Draws
from mesh.engine.vllm.requests import Kept
from mesh.types import Sampling


class DrawnTokens(NamedTuple):
    """The tokens of one step, a row for each request name, on the CPU once `copied` is done.

    indices: of the tokens in their turns; -1: vLLM discards it; copied: None if there was
    nothing to copy.
    """

    names: list[str]
    indices: np.ndarray
    tokens_S: torch.Tensor
    logprobs_S: torch.Tensor
    copied: torch.cuda.Event | None


class CounterSampler:
    """Owns the tokens and logprobs of the requests in flight. `runner`: vLLM's model runner."""

    def __init__(self, runner: Any, draws: Draws) -> None:
        self.runner, self.draws = runner, draws
        lengths = runner.seq_lens
        self.static_2S = lengths.new_zeros(2, len(lengths), dtype=torch.int64)
        self.rows = DrawBuffers(self.static_2S[0], self.static_2S[1], lengths)
        self.sampling: Sampling | None = None  # of all requests in flight
        self.keys: dict[str, int] = {}
        self.samples: dict[str, Kept] = {}
        self.drawn: dict[str, tuple[list[int], list[float]]] = {}
        self.names: list[str] = []
        self.steps: list[DrawnTokens] = []

    def expect(self, samples: Mapping[str, Kept], sampling: Sampling) -> None:
        """Register requests, by name, before they run."""
        self.sampling = sampling
        ids_S2 = torch.tensor([s.key for s in samples.values()], dtype=torch.int64).view(-1, 2)
        self.keys.update(zip(samples, sequence_keys(sampling, ids_S2).tolist(), strict=True))
        self.samples.update(samples)
        self.drawn.update({name: ([], []) for name in samples})

    def __call__(self, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        """Draw a token for each row of `logits`, which is the model's output for `Draws`."""
        assert self.sampling is not None, "vLLM samples without a request"
        batch = self.runner.input_batch
        count = batch.num_reqs
        prompt_lengths, names = batch.num_prompt_tokens[:count], batch.req_ids[:count]
        if names != self.names:
            self._set_rows(names)
        tokens_S, logprobs_S = self.draws(logits, self.rows, self.sampling)
        lengths = self.runner.optimistic_seq_lens_cpu[:count].numpy()
        discarded = self.runner.discard_request_mask.np[:count]
        indices = np.where(discarded, -1, lengths - prompt_lengths)
        self.steps.append(_copied(self.names, indices, tokens_S, logprobs_S))
        return SamplerOutput(tokens_S.int()[:, None], logprobs_tensors=None)

    def _set_rows(self, names: list[str]) -> None:
        """Write the keys and prompt lengths of another set of sequences into the static buffers,
        asynchronously on CUDA. vLLM takes all that is known before a turn for its prompt.
        """
        self.names = names
        prompts = [self.samples[name].num_prompt for name in names]
        rows_2S = torch.tensor([[self.keys[name] for name in names], prompts])
        if self.static_2S.is_cuda:
            rows_2S = rows_2S.pin_memory().to(self.static_2S.device, non_blocking=True)
        self.static_2S[:, : len(names)] = rows_2S

    def rows_of(self, sizes: list[int], positions: list[int]) -> list[Row]:
        """The rows of a batch in which each request has so many tokens, at these positions. Those
        of a prompt's pages, except for its last token, may serve all its samples.
        """
        rows: list[Row] = []
        rest = iter(positions)
        for name, size in zip(self.runner.input_batch.req_ids, sizes, strict=False):
            (prompt_id, sample_id), last = self.samples[name].key, self.samples[name].num_prompt - 1
            places = [next(rest) for _ in range(size)]
            rows += [(prompt_id, sample_id if p >= last else None, p) for p in places]
        return rows

    def read(self, in_flight: int) -> None:
        """Move the tokens of all steps but the last `in_flight` ones to their requests."""
        done = len(self.steps) - in_flight
        assert done >= 0, f"{in_flight} steps are in flight, and {len(self.steps)} have drawn"
        for step in self.steps[:done]:
            if step.copied is not None:
                step.copied.synchronize()
            self._distribute(step)
        del self.steps[:done]

    def _distribute(self, step: DrawnTokens) -> None:
        rows = zip(
            step.names,
            step.indices.tolist(),
            step.tokens_S.tolist(),
            step.logprobs_S.tolist(),
            strict=True,
        )
        for name, index, token, logprob in rows:
            if index < 0 or name not in self.drawn:  # discarded, or beyond the end
                continue
            tokens, logprobs = self.drawn[name]
            assert index <= len(tokens), f"{name}: a token before {index} was not drawn"
            tokens[index:], logprobs[index:] = [token], [logprob]

    def take(self, name: str) -> tuple[Kept, list[int], list[float]]:
        """Remove a finished request and return (its sample, tokens, logprobs)."""
        del self.keys[name]
        return self.samples.pop(name), *self.drawn.pop(name)


def _copied(
    names: list[str], indices: np.ndarray, tokens_S: torch.Tensor, logprobs_S: torch.Tensor
) -> DrawnTokens:
    """Start the copies to the CPU, on CUDA without waiting for them."""
    if not tokens_S.is_cuda:
        return DrawnTokens(names, indices, tokens_S, logprobs_S, None)
    copies = [x.to("cpu", non_blocking=True) for x in (tokens_S, logprobs_S)]
    copied = torch.cuda.Event()
    copied.record()
    return DrawnTokens(names, indices, copies[0], copies[1], copied)
