"""Plain vLLM for `engine.py`: its own LLM class, model and settings, as a baseline.

It returns no logprobs; our engines do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from vllm import LLM, SamplingParams

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.engine.settings import engine_settings
from mesh.model.families import config_entries, shape_of_flavor


def main(prompt_tokens: int, words: list[str]) -> None:
    torch.set_num_threads(1)
    _, conf = load_conf(words)
    llm, vocabulary = plain(conf), shape_of_flavor(conf.model.flavor).vocab_size
    seconds(llm, vocabulary, prompt_tokens, 1, 1)
    print("bench: ready", flush=True)
    for line in sys.stdin:
        batch, new = int(line), conf.generator.max_new_tokens
        taken = seconds(llm, vocabulary, prompt_tokens, batch, new)
        print(f"bench: {batch * new / taken}", flush=True)


def plain(conf: Conf) -> LLM:
    """vLLM's LLM with dummy weights and as much KV cache as our engines have."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings, shape = engine_settings(conf, device), shape_of_flavor(conf.model.flavor)
    itemsize = 2 if device == "cuda" else 4
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * itemsize
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config_entries(shape, (0,))))
        return LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16" if device == "cuda" else "float32",
            max_model_len=settings.max_length,
            max_num_seqs=settings.max_sequences,
            enable_prefix_caching=settings.prefix_cache,
            kv_cache_memory_bytes=settings.kv_tokens * token,
            gpu_memory_utilization=0.01,  # nothing beyond the cache above
            enforce_eager=device == "cpu",
        )


def seconds(llm: LLM, vocabulary: int, prompt: int, batch: int, new: int) -> float:
    """Time to generate a batch: wall time on a GPU, else CPU time of this process."""
    tokens = torch.randint(vocabulary, (batch, prompt)).tolist()
    params = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    prompts = [{"prompt_token_ids": row} for row in tokens]
    outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    assert sum(len(o.outputs[0].token_ids) for o in outputs) == batch * new
    return clock() - began


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
