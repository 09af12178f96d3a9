"""Hugging Face directories: read a shard of every weight, write the whole model.

Reading touches only the bytes of this rank's blocks; no rank ever holds a whole model. Writing
gathers one weight at a time to the first rank of the trainer's mesh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from mesh.model.qwen3 import Qwen3, adapter, model_config, named_weights
from mesh.reshard import Block
from mesh.types import ModelShape

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def hf_names(names: list[str], shape: ModelShape) -> dict[str, str]:
    """Hugging Face's name of every weight, by torchtitan's. A tied head is its embedding."""
    marked = {name: name for name in names}
    theirs = {ours: name for name, ours in adapter(shape).to_hf(marked).items()}
    if shape.tied:
        theirs["lm_head.weight"] = theirs["tok_embeddings.weight"]
    return theirs


def weight_files(path: Path) -> dict[str, Path]:
    """The file that holds each weight of a directory, by Hugging Face's names."""
    if (path / INDEX).exists():
        entries = json.loads((path / INDEX).read_text())["weight_map"]
        return {name: path / file for name, file in entries.items()}
    file = path / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), file)


@torch.no_grad()
def load_weights(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, Block | None],
    shape: ModelShape,
) -> None:
    """Copy this rank's blocks of the weights in `path` into `tensors`, in their dtype.

    tensors: local shards by torchtitan's names; blocks: where each lies in its weight (None: this
    rank has nothing of it). Raises ValueError naming the weight that is missing or misshapen.
    """
    files = weight_files(path)
    theirs = hf_names(list(tensors), shape)
    sizes = whole_sizes(shape)
    by_file: dict[Path, list[str]] = {}
    for name in tensors:
        if theirs[name] not in files:
            raise ValueError(
                f"model.path={path}: {theirs[name]} is missing from the safetensors files; "
                "use a complete checkpoint of this architecture"
            )
        by_file.setdefault(files[theirs[name]], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as handle:
            for name in names:
                stored, block = handle.get_slice(theirs[name]), blocks[name]
                if tuple(stored.get_shape()) != sizes[name]:
                    raise ValueError(
                        f"{file}: {theirs[name]} has shape {stored.get_shape()}, which does not "
                        f"fit config.json ({list(sizes[name])}); use both of one model"
                    )
                if block is not None and tensors[name].numel():
                    tensors[name].copy_(stored[block.slices])


def whole_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The size of every whole weight, by torchtitan's names."""
    with torch.device("meta"):
        weights = named_weights(Qwen3(model_config(shape, 1)))
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def config_entries(
    shape: ModelShape, max_length: int, eos_ids: tuple[int, ...]
) -> dict[str, object]:
    """The `config.json` from which `transformers` builds a model of this shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": list(eos_ids) if len(eos_ids) != 1 else eos_ids[0],
        "dtype": "float32",
    }


def _whole(
    weights: Mapping[str, torch.Tensor], shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, whole tensor on the CPU), one at a time; a collective of the mesh."""
    theirs = hf_names(list(weights), shape)
    for name, tensor in weights.items():
        if shape.tied and name == "lm_head.weight":
            continue
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield theirs[name], full.detach().cpu()


@torch.no_grad()
def save_weights(
    path: Path, weights: Mapping[str, torch.Tensor], shape: ModelShape, write: bool
) -> None:
    """Write `weights` as safetensors files of at most 4 GiB and their index, in their dtype.

    A collective of the ranks that hold the weights; the one with `write` writes. A tied head is
    left out, as `transformers` does.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: list[Path] = []
    placed: dict[str, int] = {}
    room = SHARD_BYTES
    for name, tensor in _whole(weights, shape):
        if not write:
            continue
        if shards[-1] and tensor.nbytes > room:
            files.append(_write_shard(path, len(files), shards.pop()))
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor.contiguous()
        placed[name] = len(files)
        room -= tensor.nbytes
    if write:
        files.append(_write_shard(path, len(files), shards.pop()))
        _name_shards(path, files, placed)


def _write_shard(path: Path, number: int, tensors: dict[str, torch.Tensor]) -> Path:
    file = path / f"shard-{number}.safetensors"
    file.touch()
    mode = file.stat().st_mode  # by the user's umask; safetensors keeps its files to their owner
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
    return file


def _name_shards(path: Path, files: list[Path], placed: dict[str, int]) -> None:
    """Hugging Face's file names say how many shards there are, known only now."""
    if len(files) == 1:
        files[0].rename(path / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    total = sum(file.stat().st_size for file in files)
    for file, name in zip(files, names, strict=True):
        file.rename(path / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[number] for name, number in placed.items()},
    }
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def export(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    shape: ModelShape,
    max_length: int,
    tokenizer: Path,
    eos_ids: tuple[int, ...],
    write: bool,
) -> None:
    """A Hugging Face directory that `transformers` loads: weights, config.json, tokenizer files.

    `tokenizer`: the directory whose tokenizer files are copied. A collective as `save_weights`.
    """
    if write:
        path.mkdir(parents=True, exist_ok=True)
        entries = config_entries(shape, max_length, eos_ids)
        (path / "config.json").write_text(json.dumps(entries, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists() and tokenizer.resolve() != path.resolve():
                shutil.copyfile(tokenizer / name, path / name)
    save_weights(path, weights, shape, write)
