"""What a vLLM of its own is told about our model before it starts, and what is refused.

vLLM calls the hook of an architecture while it makes its configuration, before it starts a process:
so a refusal reaches the user there. Our own settings are entries of vLLM's additional_config, which
all its processes get.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config import CompilationMode, CUDAGraphMode, ModelConfig, VllmConfig
from vllm.platforms import current_platform

from mesh.config.declare import INF
from mesh.config.keys import problem, refuse
from mesh.config.schema import Conf
from mesh.config.spelling import near_keys
from mesh.engine.vllm.checks import other_switch_problems
from mesh.layout.sizes import tp_problems
from mesh.model.attention import CUDA_PAGE, HEAD_DIMS
from mesh.model.families import shape_of_directory
from mesh.model.weight_checks import weight_problems
from mesh.text.tokenizer import load_tokenizer, textless_ids
from mesh.types import ModelShape

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
COMPLETE = "serve a directory with all weights of its config.json"
FORMATS = ("auto", "hf", "safetensors")
"""vLLM's load formats that read the files and hand the weights to the model."""


@dataclass(frozen=True)
class Serving:
    """Keys of the run, which additional_config repeats; see `KEYS`."""

    batch_invariant: bool = False
    chunks: int = Conf().invariant.chunks
    temperature: float = 1.0


class Key(NamedTuple):
    """An entry of additional_config: its field of `Serving`, and what it may be."""

    field: str
    fits: Callable[[Any], bool]
    meaning: str


KEYS = {
    "batch_invariant": Key("batch_invariant", lambda x: type(x) is bool, "true or false"),
    "invariant.chunks": Key("chunks", lambda x: type(x) is int and x > 0, "a number of ranks"),
    "generator.temperature": Key(
        "temperature", lambda x: type(x) in (int, float) and 0 < x < INF, "a number above 0"
    ),
}
"""By the key of the run."""


def choose_runner(config: ModelConfig) -> None:
    """Choose vLLM's first model runner, whose sampler can report the model's logits unchanged."""
    if os.environ.setdefault(RUNNER, "0") != "0":
        wrong = "that model runner computes logprobs of its own"
        refuse([problem(RUNNER, os.environ[RUNNER], wrong, "unset it")])
    if config.logprobs_mode == "raw_logprobs":
        config.logprobs_mode = "raw_logits"


def configure(vllm_config: VllmConfig) -> None:
    """Set what the model needs of vLLM. Raises one Refusal that lists all that cannot be served."""
    refuse(serving_problems(vllm_config))
    cache, compilation = vllm_config.cache_config, vllm_config.compilation_config
    on_gpu = current_platform.is_cuda()
    if on_gpu and not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = CUDA_PAGE, True
    graphs = on_gpu and not vllm_config.model_config.enforce_eager
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if graphs else CUDAGraphMode.NONE


def serving_of(vllm_config: VllmConfig) -> Serving:
    """The settings in additional_config, which `configure` has checked."""
    given = vllm_config.additional_config
    assert isinstance(given, Mapping)
    return Serving(**{KEYS[name].field: value for name, value in given.items()})


def served_shape(config: ModelConfig) -> ModelShape:
    """The shape of the directory's model, with the tokenizer's ids without a text. Raises
    ValueError for another family, and for files that cannot be read.
    """
    shape = shape_of_directory(Path(config.model))
    tokenizer = load_tokenizer(config.tokenizer, Path(config.model))
    return replace(shape, textless=textless_ids(tokenizer, shape.vocab_size))


def serving_problems(vllm_config: VllmConfig) -> list[str]:
    """Everything that keeps a directory from being served as it was trained."""
    settings = setting_problems(vllm_config.additional_config)
    found = [
        *settings,
        *option_problems(vllm_config),
        *other_switch_problems("batch_invariant", True),
    ]
    serving = Serving() if settings else serving_of(vllm_config)
    return found + model_problems(vllm_config, serving)


def model_problems(vllm_config: VllmConfig, serving: Serving) -> list[str]:
    """A directory that is not there or whose files are not those of a model of ours, and a layout
    that does not fit it.
    """
    config, path = vllm_config.model_config, Path(vllm_config.model_config.model)
    if not path.is_dir():
        wrong, remedy = "is not a directory of this machine", "download it, and name the directory"
        return [problem("model", config.model, wrong, remedy)]
    try:
        shape = served_shape(config)
    except ValueError as error:
        return str(error).splitlines()
    tp = vllm_config.parallel_config.tensor_parallel_size
    lines = weight_problems(path, shape)
    return [
        *(problem("model", config.model, line, COMPLETE) for line in lines),
        *tp_problems("tensor_parallel_size", tp, shape),
        *context_problems(config.max_model_len, shape),
        *(exact_problems(serving, shape, tp, config.dtype) if serving.batch_invariant else []),
    ]


def context_problems(length: int, shape: ModelShape) -> list[str]:
    """A context beyond the model's: with a sliding window it is another function there."""
    if length <= shape.max_positions:
        return []
    wrong = (
        f"the model's own context is {shape.max_positions} tokens (max_position_embeddings, or a "
        "sliding_window)"
    )
    return [problem("max_model_len", length, wrong, f"use at most {shape.max_positions}")]


def setting_problems(given: Any) -> list[str]:
    """Entries of additional_config that are none of ours, or of another type."""
    if not isinstance(given, Mapping):
        return [problem("additional_config", given, "is no mapping", "give keys and values")]
    found = []
    for name, value in given.items():
        if name not in KEYS:
            near = " or ".join(near_keys(name, KEYS)) or f"one of {', '.join(KEYS)}"
            found.append(problem(f"additional_config.{name}", value, "is no key", f"use {near}"))
            continue
        if not KEYS[name].fits(value):
            wrong = f"is not {KEYS[name].meaning}"
            found.append(problem(f"additional_config.{name}", value, wrong, "correct it"))
    return found


def option_problems(vllm_config: VllmConfig) -> list[str]:
    """Options of vLLM that our model does not follow, and that would be silently lost."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, load = vllm_config.cache_config, vllm_config.load_config
    others: Any = config.hf_overrides
    if isinstance(others, Mapping):
        others = {name: value for name, value in others.items() if name != "architectures"}
    page = cache.block_size if cache.user_specified_block_size else CUDA_PAGE
    dtype = str(config.dtype).removeprefix("torch.")
    options = {  # name: (value, is it followed, what to do)
        "dtype": (dtype, dtype in ("float32", "bfloat16"), "use float32 or bfloat16"),
        "load_format": (load.load_format, load.load_format in FORMATS, "leave it out"),
        "quantization": (config.quantization, config.quantization is None, "leave it out"),
        "kv_cache_dtype": (
            cache.cache_dtype, cache.cache_dtype in ("auto", dtype), "leave it out"
        ),
        "hf_overrides": (others, not others, "change config.json"),
        "pipeline_parallel_size": (
            parallel.pipeline_parallel_size, parallel.pipeline_parallel_size == 1,
            "use tensor_parallel_size",
        ),
        "enable_lora": ("true", vllm_config.lora_config is None, "leave it out"),
        "speculative_config": ("...", vllm_config.speculative_config is None, "leave it out"),
        "block_size": (
            page, not current_platform.is_cuda() or page % CUDA_PAGE == 0,
            f"use a multiple of {CUDA_PAGE}",
        ),
    }  # fmt: skip
    wrong = "the trained model does not have it"
    return [problem(name, value, wrong, do) for name, (value, ok, do) in options.items() if not ok]


def exact_problems(serving: Serving, shape: ModelShape, tp: int, dtype: torch.dtype) -> list[str]:
    """Problems of a layout or a device that cannot have the bits of training."""
    found = []
    if serving.chunks % tp:
        wrong = f"does not divide invariant.chunks={serving.chunks}"
        remedy = f"use a divisor, or additional_config.invariant.chunks={tp}"
        found.append(problem("tensor_parallel_size", tp, wrong, remedy))
    if not current_platform.is_cuda():
        return found
    on_gpu = "cannot be exact on a GPU"
    if dtype != torch.bfloat16:
        found.append(problem("dtype", dtype, on_gpu, "use bfloat16"))
    if not current_platform.is_device_capability_family(90):
        wrong = f"{current_platform.get_device_name()} is not a Hopper GPU"
        found.append(problem("batch_invariant", True, wrong, "use an H100 or H200, or a CPU"))
    if shape.head_dim not in HEAD_DIMS:
        wrong = f"the exact attention kernels do not take heads of {shape.head_dim}"
        remedy = f"use a model with heads of {', '.join(map(str, HEAD_DIMS))}, or a CPU"
        found.append(problem("batch_invariant", True, wrong, remedy))
    return found
