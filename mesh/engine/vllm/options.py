"""vLLM's arguments from our settings. Needs no vLLM."""

from __future__ import annotations

from typing import Any

import torch

from mesh.engine.base import EngineSettings, num_pages
from mesh.model.families import config_entries
from mesh.types import ModelShape


def model_entries(shape: ModelShape, architecture: str | None) -> dict[str, Any]:
    """The config.json for vLLM, with the architecture that it builds; None: its own."""
    entries: dict[str, Any] = config_entries(shape, ())
    for name in ("eos_token_id", "pad_token_id"):  # neither is used: nothing ends or is padded here
        entries.pop(name, None)
    return entries if architecture is None else entries | {"architectures": [architecture]}


def engine_options(
    settings: EngineSettings,
    shape: ModelShape,
    tp: int,
    device: torch.device,
    dtype: torch.dtype,
    ours: bool,
) -> dict[str, Any]:
    """vLLM's arguments for these sizes. Block 0 is reserved by vLLM and holds no sequence.

    ours: the model is the trainer's, which vLLM does not compile.
    """
    blocks = 1 + num_pages(settings.kv_tokens, settings.page_size)
    token = 2 * shape.num_layers * shape.kv_heads_of_rank(tp) * shape.head_dim * dtype.itemsize
    graphs = settings.cuda_graphs and device.type == "cuda"
    compiled = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"} if ours and graphs else {}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": settings.max_length,
        # vLLM counts the tokens of decode steps too
        "max_num_seqs": min(settings.max_sequences, settings.prefill_tokens),
        "max_num_batched_tokens": settings.prefill_tokens,
        "block_size": settings.page_size,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": blocks * settings.page_size * token,
        # vLLM checks that this share of the device is free, and allocates what the line above says
        "gpu_memory_utilization": 0.01,
        "enable_sleep_mode": settings.releases,
        # vLLM's kernels that draw tokens are not used
        "kernel_config": {"enable_jit_warmup": False},
        "enable_prefix_caching": settings.prefix_cache,
        "enforce_eager": not graphs,
        "compilation_config": compiled,
    }
