"""vLLM's own model of directories, one after another: `plain_vllm_program.py PROMPTS.json DIR...`

Its last line is the greedy continuations of each as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NEW_TOKENS = 12


def main(asked: str, directories: list[str]) -> None:
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": tokens} for tokens in json.loads(Path(asked).read_text())]
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    found = []
    for directory in directories:
        llm = LLM(directory, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 24)
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
        del llm
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
