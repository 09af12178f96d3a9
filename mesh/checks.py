"""What is refused at start-up, before any model is built: all of it in one list."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mesh.conf import Conf, resolve_path
from mesh.keys import problem, range_problems, refuse
from mesh.layout import layout_problems, resolve_device
from mesh.types import ModelShape

CUDA_PAGE = 256
CPU_PAGE = 16
INDEX = "model.safetensors.index.json"


def check_start(
    conf: Conf, world_size: int, shape: ModelShape | None, found: Sequence[str] = ()
) -> None:
    """Raises one ValueError that lists everything which keeps the run from starting.

    `shape` None leaves out what the model's sizes ask of the layout; `found`: problems that are
    known already. Call it before rank 0 writes into `run_dir`, on every rank.
    """
    exact = invariant_problems(conf, shape) if conf.batch_invariant else []
    refuse([*found, *conf_problems(conf), *layout_problems(conf, world_size, shape), *exact])


def conf_problems(conf: Conf) -> list[str]:
    """Every problem that `conf` has on this machine, whatever the world's size."""
    return [
        *range_problems(conf),
        *device_problems(conf),
        *length_problems(conf),
        *page_problems(conf),
        *run_dir_problems(conf),
        *model_problems(conf),
    ]


def invariant_problems(conf: Conf, shape: ModelShape | None) -> list[str]:
    """What cannot be exact: layouts beyond the chunks, dtypes that differ, fp32 on a GPU."""
    chunks, found = conf.invariant.chunks, []
    if chunks & (chunks - 1):
        wrong = "is no power of two, so its sums are no binary tree"
        found.append(problem("invariant.chunks", chunks, wrong, "use 1, 2, 4 or 8"))
    for name, tp in (("trainer.tp", conf.trainer.tp), ("generator.tp", conf.generator.tp)):
        if chunks % tp:
            wrong = f"row-parallel layers are summed in invariant.chunks={chunks} pieces, by whole"
            wrong += " pieces a rank"
            remedy = f"use a divisor of {chunks}, or set invariant.chunks={tp}"
            found.append(problem(name, tp, wrong, remedy))
    if shape is not None:
        widths = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim)
        uneven = [width for width in (*widths, shape.ffn_dim) if width % chunks]
        if uneven:
            wrong = f"does not divide the model's widths {', '.join(map(str, uneven))}"
            found.append(problem("invariant.chunks", chunks, wrong, "use a smaller power of two"))
    if conf.trainer.dtype != conf.generator.dtype:
        wrong = f"differs from trainer.dtype={conf.trainer.dtype}: their bits cannot be equal"
        remedy = "give both roles one dtype"
        found.append(problem("generator.dtype", conf.generator.dtype, wrong, remedy))
    if resolve_device(conf) == "cuda" and "float32" in (conf.trainer.dtype, conf.generator.dtype):
        wrong = "fp32 matrix products on CUDA depend on the batch"
        found.append(problem("generator.dtype", "float32", wrong, "use bfloat16, or device=cpu"))
    return found


def device_problems(conf: Conf) -> list[str]:
    """CUDA asked for without it, or more processes on this machine than it has GPUs."""
    if conf.device == "cuda" and not torch.cuda.is_available():
        wrong = "torch finds no CUDA device here"
        return [
            problem("device", "cuda", wrong, "set device=cpu, or install a CUDA build of torch")
        ]
    if resolve_device(conf) == "cpu":
        return []
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local <= gpus:
        return []
    wrong = f"{local} processes on this machine, which has {gpus} GPUs"
    return [problem("device", conf.device, wrong, f"start at most {gpus}, or set device=cpu")]


def length_problems(conf: Conf) -> list[str]:
    """Token counts that leave no room: for a prompt, or for one whole sequence."""
    limit, response = conf.model.max_length, conf.generator.max_new_tokens
    packed, found = conf.trainer.microbatch_tokens, []
    if response >= limit:
        wrong = f"leaves no room for a prompt in model.max_length={limit}"
        remedy = f"use at most {limit - 1}, or raise model.max_length"
        found.append(problem("generator.max_new_tokens", response, wrong, remedy))
    if packed < limit:
        wrong = f"one sequence of model.max_length={limit} does not fit"
        remedy = f"use at least {limit}, or lower model.max_length"
        found.append(problem("trainer.microbatch_tokens", packed, wrong, remedy))
    return found


def page_problems(conf: Conf) -> list[str]:
    """A page size that the CUDA kernel refuses; a KV cache too small for one whole sequence."""
    on_cuda, found = resolve_device(conf) == "cuda", []
    page, tokens = conf.generator.page_size, conf.generator.kv_tokens
    if on_cuda and page % CUDA_PAGE:
        wrong = f"the CUDA attention kernel wants a multiple of {CUDA_PAGE}"
        remedy = f"use {-(-page // CUDA_PAGE) * CUDA_PAGE}, or 0 for the default"
        found.append(problem("generator.page_size", page, wrong, remedy))
    page = max(page, 0) or (CUDA_PAGE if on_cuda else CPU_PAGE)
    needed = -(-conf.model.max_length // page) * page
    if tokens > 0 and tokens // page * page < needed:
        wrong = (
            f"in pages of {page} it does not hold one sequence of "
            f"model.max_length={conf.model.max_length}"
        )
        remedy = f"use at least {needed}, or 0 for the default"
        found.append(problem("generator.kv_tokens", tokens, wrong, remedy))
    return found


def run_dir_problems(conf: Conf) -> list[str]:
    """A run directory that is a file, or already holds a run."""
    if conf.run_dir is None:
        return []
    path = resolve_path(conf.run_dir)
    if path.exists() and not path.is_dir():
        return [problem("run_dir", conf.run_dir, "is a file", "name a directory")]
    holds = [name for name in ("config.yaml", "metrics.jsonl") if (path / name).exists()]
    if not holds:
        return []
    wrong = f"already holds a run ({', '.join(holds)})"
    return [
        problem("run_dir", conf.run_dir, wrong, "name another directory, or move that run away")
    ]


def model_problems(conf: Conf) -> list[str]:
    """Files that `model.path` and `model.tokenizer` lack or that were cut short."""
    model = conf.model
    if model.path is None and model.init == "checkpoint":
        wrong = "there are no weights to start from"
        remedy = "set model.path=DIRECTORY (Hugging Face form), or model.init=random"
        found = [problem("model.path", None, wrong, remedy)]
    else:
        found = [] if model.path is None else directory_problems(conf, model.path)
    if model.tokenizer is not None:
        path = resolve_path(model.tokenizer)
        remedy = "name a directory that has one, or unset it (null)"
        if not (path / "tokenizer.json").is_file():
            found.append(problem("model.tokenizer", model.tokenizer, "no tokenizer.json", remedy))
    return found


def directory_problems(conf: Conf, name: str) -> list[str]:
    """What the directory `model.path` lacks, of all that this configuration reads from it."""
    path = resolve_path(name)
    if not path.is_dir():
        remedy = "name a Hugging Face model directory on this machine"
        return [problem("model.path", name, f"no such directory ({path})", remedy)]
    wrong = [(readable_json(path / "config.json")[1], "copy it from the model's source")]
    if conf.model.tokenizer is None:
        remedy = "copy it there, or set model.tokenizer=DIRECTORY"
        wrong.append((readable_json(path / "tokenizer.json")[1], remedy))
    if conf.model.init == "checkpoint":
        remedy = "copy it from the model's source, or set model.init=random"
        wrong += [(line, remedy) for line in weight_problems(path)]
    return [problem("model.path", name, line, remedy) for line, remedy in wrong if line]


def weight_problems(path: Path) -> list[str]:
    """Weight files that are missing or damaged: one model.safetensors, or all the index names."""
    if (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif (path / INDEX).is_file():
        index, wrong = readable_json(path / INDEX)
        shard_of = index.get("weight_map") if isinstance(index, dict) else None
        if wrong or not isinstance(shard_of, dict):
            return [wrong or f"{INDEX} has no weight_map"]
        shards = sorted({str(shard) for shard in shard_of.values()})
    else:
        return [f"neither model.safetensors nor {INDEX} is there"]
    return [line for shard in shards if (line := shard_problem(path / shard))]


def readable_json(path: Path) -> tuple[Any, str | None]:
    """The content of a JSON file, or what is wrong with it."""
    if not path.is_file():
        return None, f"{path.name} is missing"
    try:
        return json.loads(path.read_text()), None
    except ValueError as error:
        return None, f"{path.name} is not JSON ({error})"


def shard_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file: missing, or not as long as its own header says.

    Its form: 8 bytes of little-endian header length, a JSON header with each tensor's
    `data_offsets`, then the data (https://huggingface.co/docs/safetensors, "Format").
    """
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        ends = [item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return f"{path.name} is not a safetensors file, or was cut short"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{path.name} has {size} bytes instead of {expected}"
