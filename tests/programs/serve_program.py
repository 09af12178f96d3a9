"""A stand-alone vLLM that serves a directory as its user starts it, without any code of ours:

python tests/programs/serve_program.py DIR TP ASKED.json ANSWERS.json

ASKED: {"scored": [token ids], "prompts": [token ids], "settings": additional_config}. ANSWERS: the
logprobs of each scored sequence but its first token, and (tokens, logprobs) of each prompt's
continuation, drawn and greedy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KV_BYTES = 1 << 24


def main(directory: str, tp: str, asked: str, answers: str) -> None:
    from vllm import LLM, SamplingParams

    question = json.loads(Path(asked).read_text())
    llm = LLM(
        directory,
        hf_overrides={"architectures": ["MeshPolicy"]},
        additional_config=question["settings"],
        tensor_parallel_size=int(tp),
        dtype="float32",
        max_num_seqs=16,
        kv_cache_memory_bytes=KV_BYTES,
    )
    scored = [{"prompt_token_ids": tokens} for tokens in question["scored"]]
    prompts = [{"prompt_token_ids": tokens} for tokens in question["prompts"]]
    whole = SamplingParams(max_tokens=1, prompt_logprobs=0)
    drawn = SamplingParams(max_tokens=20, temperature=1.0, seed=3, logprobs=0, ignore_eos=True)
    greedy = SamplingParams(max_tokens=20, temperature=0.0, logprobs=2, ignore_eos=True)
    found = {
        "scored": [prompt_logprobs(output) for output in llm.generate(scored, whole)],
        "drawn": [continuation(output) for output in llm.generate(prompts, drawn)],
        "greedy": [continuation(output) for output in llm.generate(prompts, greedy)],
    }
    Path(answers).write_text(json.dumps(found))


def prompt_logprobs(output: Any) -> list[float]:
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [logprobs[token].logprob for token, logprobs in pairs]


def continuation(output: Any) -> tuple[list[int], list[float]]:
    (one,) = output.outputs
    pairs = zip(one.token_ids, one.logprobs, strict=True)
    return list(one.token_ids), [logprobs[token].logprob for token, logprobs in pairs]


if __name__ == "__main__":
    main(*sys.argv[1:])
