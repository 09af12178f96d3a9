"""Hugging Face directories: read a shard of every weight, write the whole model.

Reading touches only this rank's blocks; no rank ever holds a whole model. Writing gathers one
weight at a time on the trainer's first rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from mesh.layout.reshard import Block
from mesh.lifecycle.files import sync_directory
from mesh.lifecycle.heartbeat import heartbeat
from mesh.lifecycle.json_files import read_object
from mesh.model.exported import Export, remove_older_model, write_text_files
from mesh.model.families import hf_names
from mesh.model.safetensors_files import INDEX, SINGLE, weight_files
from mesh.model.weight_checks import weight_problems
from mesh.types import ModelShape

SHARD_BYTES = 4 << 30


def code_problems(directory: Path) -> list[str]:
    """Files that ask `transformers` to run the model's own code (trust_remote_code).

    A file that cannot be read is reported where it is needed.
    """
    found = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            wanted = read_object(directory / name).get("auto_map")
        except ValueError:
            continue
        if wanted:
            found.append(f"{name} asks for custom code (auto_map: {json.dumps(wanted)})")
    return found


@torch.no_grad()
def load_weights(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, Block | None],
    shape: ModelShape,
    stored_vocab: int | None = None,
) -> None:
    """Copy this rank's blocks of the weights in `path` into `tensors`, in their dtype.

    tensors: local shards by torchtitan's names; blocks: each one's place in its weight (None: this
    rank has nothing of it); stored_vocab: rows of the vocabulary in `path`, where they are not as
    many as in `shape`: rows beyond either end are left out, or zeros. Raises ValueError listing
    weights that are missing or misshapen.
    """
    # the start refuses tensors that nobody reads, unless the user has it ignore them
    stored_shape = replace(shape, vocab_size=stored_vocab or shape.vocab_size)
    wrong = weight_problems(path, stored_shape, ignored=["*"])
    if wrong:
        raise ValueError(f"model.path={path}: {'; '.join(wrong)}; use a complete checkpoint")
    theirs = hf_names(list(tensors), shape)
    # a tied weight, which has two names, is read once
    wanted = {(theirs[n], x.data_ptr()): (x, blocks[n]) for n, x in tensors.items() if x.numel()}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as handle:
            held = set(handle.keys())
            for (name, _), (tensor, block) in wanted.items():
                heartbeat()
                if name in held and block is not None:
                    _copy_rows(handle.get_slice(name), block, tensor)


def _copy_rows(stored: Any, block: Block, tensor: torch.Tensor) -> None:
    """Copy a block of a stored tensor; rows that it does not have become zeros."""
    rows = min(max(stored.get_shape()[0] - block.offset[0], 0), block.size[0])
    if rows:
        held = stored[block.narrow(0, 0, rows).slices]
        tensor[:rows].copy_(held.to(tensor.device))  # a GPU casts what it has been sent
    tensor[rows:].zero_()


def _full_weights(
    weights: Mapping[str, torch.Tensor], shape: ModelShape, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, full tensor on the CPU), one at a time. Collective over the mesh."""
    theirs = hf_names(list(weights), shape)
    for name, tensor in weights.items():
        if shape.tied and name == "lm_head.weight":
            continue
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield theirs[name], full.detach().to(dtype).cpu()


@torch.no_grad()
def save_weights(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    shape: ModelShape,
    write: bool,
    dtype: torch.dtype,
) -> None:
    """Write `weights`, rounded to `dtype`, as safetensors files of at most 4 GiB and their index.

    Collective over the ranks that hold the weights; the one with `write` writes. A tied head is
    left out, as in `transformers`.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: list[Path] = []
    placed: dict[str, int] = {}
    room = SHARD_BYTES
    for name, tensor in _full_weights(weights, shape, dtype):
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
        _rename_shards(path, files, placed)


def _write_shard(path: Path, number: int, tensors: dict[str, torch.Tensor]) -> Path:
    file = path / f"shard-{number}.safetensors"
    file.touch()
    mode = file.stat().st_mode  # by the user's umask; safetensors makes its files private
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
    return file


def _rename_shards(path: Path, files: list[Path], placed: dict[str, int]) -> None:
    """Apply Hugging Face's file names, which contain the number of shards, known only now."""
    if len(files) == 1:
        files[0].rename(path / SINGLE)
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
    plan: Export,
    write: bool,
) -> None:
    """Write a Hugging Face directory that `transformers` loads: weights, config, tokenizer files.

    An older model in `path` is replaced, files of other names stay. Collective, as `save_weights`.
    An interrupted export leaves `path`.partial behind and `path` unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text_files(partial, plan)
    save_weights(partial, weights, shape, write, plan.dtype)
    if write:
        sync_directory(partial)  # before the rename marks it complete
        _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    """Rename the directory; into an existing one, which may hold other files, move file by file."""
    if not path.exists():
        partial.rename(path)
        return
    remove_older_model(path, kept={file.name for file in partial.iterdir()} - {SINGLE, INDEX})
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            target = path / file.relative_to(partial)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    shutil.rmtree(partial)
