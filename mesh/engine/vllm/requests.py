"""Our requests as vLLM's, and their results as completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request as CoreRequest

from mesh.types import Completion, FinishReason, RolloutKey, Sampling

REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def key_of(name: str) -> RolloutKey:
    """The sample that a vLLM request of this name generates."""
    prompt_id, sample_id, _ = name.split("/")
    return int(prompt_id), int(sample_id)


@dataclass(frozen=True)
class Kept:
    """A sample whose turn runs, or that waits for its next one. tokens: all that are known, of
    which `num_prompt` are the prompt's, from whose end positions count.
    """

    key: RolloutKey
    tokens: tuple[int, ...]
    num_prompt: int
    keeps: bool


def core_request(
    core: EngineCore, sample: Kept, sampling: Sampling, most: int, version: int, serial: int
) -> CoreRequest:
    """vLLM's request for the sample's next turn, of at most `most` tokens. Cached pages are found
    under the weights' version only.

    serial: number of the request in its engine. It keeps names from being reused, so that a token
    of a step in flight cannot reach a later request of the same sample.
    """
    prompt_id, sample_id = sample.key
    return CoreRequest(
        f"{prompt_id}/{sample_id}/{serial}",
        list(sample.tokens),
        SamplingParams(
            max_tokens=most,
            stop_token_ids=list(sampling.stop_tokens),
            ignore_eos=True,
            detokenize=False,
        ),
        None,
        cache_salt=f"weights {version}",
        block_hasher=core.request_block_hasher,
    )


def completion_of(request: Any, tokens: list[int], logprobs: list[float]) -> Completion:
    """The completion of a finished request. tokens, logprobs: drawn for it by our sampler, perhaps
    one beyond its end.
    """
    taken = list(request.output_token_ids)
    assert tokens[: len(taken)] == taken and len(logprobs) - len(taken) in (0, 1), (
        f"{request.request_id}: vLLM holds other tokens than were drawn"
    )
    reason = str(request.get_finished_reason())
    assert reason in REASONS, f"{request.request_id}: vLLM ended it with {reason}"
    key, logprobs = key_of(request.request_id), logprobs[: len(taken)]
    return Completion(*key, tuple(taken), tuple(logprobs), REASONS[reason])
