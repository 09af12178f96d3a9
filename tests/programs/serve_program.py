"""A stand-alone vLLM that serves a directory as its user starts it, without any code of ours:

python tests/programs/serve_program.py DIR TP ASKED.json ANSWERS.json

ASKED: {"scored": [token ids], "prompts": [token ids], "settings": additional_config, "options": of
LLM}. ANSWERS: the logprobs of each scored sequence but its first token; (tokens, logprobs) of each
prompt's continuation, drawn and greedy; and the logprobs of the drawn ones scored afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(directory: str, tp: str, asked: str, answers: str) -> None:
    from vllm import LLM, SamplingParams

    question = json.loads(Path(asked).read_text())
    llm = LLM(
        directory,
        hf_overrides={"architectures": ["MeshPolicy"]},
        additional_config=question["settings"],
        tensor_parallel_size=int(tp),
        **question["options"],
    )
    whole = SamplingParams(max_tokens=1, prompt_logprobs=0)
    drawn = SamplingParams(max_tokens=20, temperature=1.0, seed=3, logprobs=0, ignore_eos=True)
    greedy = SamplingParams(max_tokens=20, temperature=0.0, logprobs=2, ignore_eos=True)
    prompts = question["prompts"]
    found = {
        "scored": [prompt_logprobs(x) for x in llm.generate(given(question["scored"]), whole)],
        "drawn": [continuation(x) for x in llm.generate(given(prompts), drawn)],
        "greedy": [continuation(x) for x in llm.generate(given(prompts), greedy)],
    }
    texts = [prompt + tokens for prompt, (tokens, _) in zip(prompts, found["drawn"], strict=True)]
    found["again"] = [prompt_logprobs(x)[-20:] for x in llm.generate(given(texts), whole)]
    Path(answers).write_text(json.dumps(found))
    end(llm)


def end(llm: Any) -> None:
    """End the engine and this process. vLLM leaves both to the interpreter's exit: its finalizer
    ends the engine there, at which its daemon thread MPClientEngineMonitor begins to clean up too,
    while the interpreter goes away under it. On two GPUs that aborted a process that had answered
    everything ("terminate called without an active exception"). So the engine is shut down before,
    for which LLM has no method of its own, and nothing is left to the interpreter's exit.
    """
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def given(sequences: list[list[int]]) -> list[Any]:
    return [{"prompt_token_ids": tokens} for tokens in sequences]


def prompt_logprobs(output: Any) -> list[float]:
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [logprobs[token].logprob for token, logprobs in pairs]


def continuation(output: Any) -> tuple[list[int], list[float]]:
    (one,) = output.outputs
    pairs = zip(one.token_ids, one.logprobs, strict=True)
    return list(one.token_ids), [logprobs[token].logprob for token, logprobs in pairs]


if __name__ == "__main__":
    main(*sys.argv[1:])
