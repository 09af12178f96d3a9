"""Our sampler in the place of vLLM's: the native engine's draw and the trainer's logprobs.

vLLM asks for a token of every scheduled sequence, also of one whose prompt is not through: the
index of a token follows from the length of its sequence, and the first token of an index is the one
that counts. vLLM's own logprobs are not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from vllm.v1.outputs import SamplerOutput

from mesh.engine.choice import choose
from mesh.engine.sampler import token_keys
from mesh.engine.vllm_parts.requests import key_of
from mesh.types import Sampling


class CounterSampler:
    """Owns the tokens and logprobs drawn since `start`. `runner`: vLLM's model runner.

    group: the ranks that hold a shard of the logits each; None: they come whole.
    """

    def __init__(self, runner: Any, group: dist.ProcessGroup | None) -> None:
        self.runner = runner
        self.group = group
        self.sampling: Sampling | None = None
        self.steps: list[tuple[list[str], list[int], torch.Tensor]] = []

    def start(self, sampling: Sampling) -> None:
        self.sampling, self.steps = sampling, []

    def __call__(self, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        assert self.sampling is not None, "vLLM samples, but nobody asked"
        batch = self.runner.input_batch
        count = batch.num_reqs
        names = batch.req_ids[:count]
        lengths_S = self.runner.optimistic_seq_lens_cpu[:count].long()
        drawn_S = lengths_S - torch.from_numpy(batch.num_prompt_tokens[:count]).long()
        ids_S2 = torch.tensor([key_of(name) for name in names])
        keys_S = token_keys(self.sampling, ids_S2, drawn_S).to(logits.device)
        tokens_S, logprobs_S = choose(logits, keys_S, self.sampling, self.group)
        # float64 holds token ids and fp32 logprobs exactly
        drawn = torch.stack([tokens_S.double(), logprobs_S.double()])
        self.steps.append((list(names), drawn_S.tolist(), drawn))
        return SamplerOutput(tokens_S.int()[:, None], logprobs_tensors=None)

    def results(self) -> dict[str, tuple[list[int], list[float]]]:
        """(tokens, logprobs) drawn for every request since `start`, by its name."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for names, indices, drawn in self.steps:
            for name, index, token, logprob in zip(names, indices, *drawn.tolist(), strict=True):
                tokens, logprobs = found.setdefault(name, ([], []))
                # below: a part of a prompt, or of a sequence that made room and is computed again
                if index == len(tokens):
                    tokens.append(int(token))
                    logprobs.append(logprob)
        return found
