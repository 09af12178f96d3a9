"""Hugging Face directories: read a shard of every weight, write the whole model.

Reading touches only this rank's blocks; no rank ever holds a whole model. Writing gathers one
weight at a time on the trainer's first rank.
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

from mesh.layout.reshard import Block
from mesh.lifecycle.files import sync_directory
from mesh.lifecycle.heartbeat import heartbeat
from mesh.model.exported import remove_older_model, write_text_files
from mesh.model.families import adapter, config_entries
from mesh.model.policy import Policy, model_config, named_weights
from mesh.types import ModelShape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


def hf_names(names: list[str], shape: ModelShape) -> dict[str, str]:
    """Hugging Face's name of every weight, by torchtitan's. A tied head maps to the embedding."""
    marked = {name: name for name in names}
    theirs = {ours: name for name, ours in adapter(shape).to_hf(marked).items()}
    if shape.tied:
        theirs["lm_head.weight"] = theirs["tok_embeddings.weight"]
    return theirs


def weight_files(path: Path) -> list[Path]:
    """Safetensors files of a directory: the single one if it exists, as in `transformers`, else
    all that the index names. Raises ValueError if there is neither.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise ValueError(f"there is neither {SINGLE} nor {INDEX}")
    try:
        files = json.loads((path / INDEX).read_text())["weight_map"].values()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{INDEX} has no weight_map") from error
    return [path / name for name in sorted({str(file) for file in files})]


def header_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a safetensors file.

    Raises ValueError if it is missing, or its size is not what its header says. Layout: header
    length, JSON header, data (https://huggingface.co/docs/safetensors, "Format").
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        text = handle.read(length) if 8 + length <= size else b""
    try:
        tensors = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        end = max((item["data_offsets"][1] for item in tensors.values()), default=0)
        shapes = {name: tuple(item["shape"]) for name, item in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{file.name} is not a safetensors file, or is truncated") from error
    if size != 8 + length + end:
        raise ValueError(f"{file.name} has {size} bytes instead of {8 + length + end}")
    return shapes


def code_problems(directory: Path) -> list[str]:
    """Files that ask `transformers` to run the model's own code (trust_remote_code).

    A file that cannot be read is reported where it is needed.
    """
    found = []
    for name in ("config.json", "tokenizer_config.json"):
        path = directory / name
        try:
            entries = json.loads(path.read_text()) if path.is_file() else None
        except ValueError:
            continue
        if isinstance(entries, dict) and entries.get("auto_map"):
            found.append(
                f"{name} asks for custom code (auto_map: {json.dumps(entries['auto_map'])})"
            )
    return found


def weight_problems(path: Path, shape: ModelShape | None) -> list[str]:
    """Missing or damaged weight files of a directory; if all are intact, weights of a model of
    `shape` that they lack or have in another shape. `shape` None skips the latter.
    """
    stored: dict[str, tuple[int, ...]] = {}
    wrong = []
    try:
        files = weight_files(path)
    except ValueError as error:
        return [str(error)]
    for file in files:
        try:
            stored |= header_of(file)
        except ValueError as error:
            wrong.append(str(error))
    return wrong if wrong or shape is None else _mismatches(stored, shape)


def _mismatches(stored: Mapping[str, tuple[int, ...]], shape: ModelShape) -> list[str]:
    sizes = global_shapes(shape)
    expected = {name: sizes[ours] for ours, name in hf_names(list(sizes), shape).items()}
    missing = [name for name in expected if name not in stored]
    other = [
        f"{name} {list(stored[name])} instead of {list(size)}"
        for name, size in expected.items()
        if stored.get(name, size) != size
    ]
    found = [f"the safetensors files lack {_shortened(missing)}"] if missing else []
    return found + ([f"shapes that do not match config.json: {_shortened(other)}"] if other else [])


def _shortened(items: list[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


@torch.no_grad()
def load_weights(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, Block | None],
    shape: ModelShape,
) -> None:
    """Copy this rank's blocks of the weights in `path` into `tensors`, in their dtype.

    tensors: local shards by torchtitan's names; blocks: each one's place in its weight (None: this
    rank has nothing of it). Raises ValueError listing weights that are missing or misshapen.
    """
    wrong = weight_problems(path, shape)
    if wrong:
        raise ValueError(f"model.path={path}: {'; '.join(wrong)}; use a complete checkpoint")
    theirs = hf_names(list(tensors), shape)
    for file in weight_files(path):
        with safe_open(file, framework="pt") as handle:
            held = set(handle.keys())
            for name in tensors:
                heartbeat()
                block = blocks[name]
                if theirs[name] in held and block is not None and tensors[name].numel():
                    tensors[name].copy_(handle.get_slice(theirs[name])[block.slices])


def global_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Global shape of every weight, by torchtitan's names."""
    with torch.device("meta"):
        weights = named_weights(Policy(model_config(shape, 1)))
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _full_weights(
    weights: Mapping[str, torch.Tensor], shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, full tensor on the CPU), one at a time. Collective over the mesh."""
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

    Collective over the ranks that hold the weights; the one with `write` writes. A tied head is
    left out, as in `transformers`.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: list[Path] = []
    placed: dict[str, int] = {}
    room = SHARD_BYTES
    for name, tensor in _full_weights(weights, shape):
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
    tokenizer: Path,
    eos_ids: tuple[int, ...],
    write: bool,
    model: Path | None = None,
) -> None:
    """Write a Hugging Face directory that `transformers` loads: weights, config, tokenizer files.

    `tokenizer`: the directory whose tokenizer files are copied; `model`: that of the weights which
    training started from. An older model in `path` is replaced, files of other names stay.
    Collective, as `save_weights`. An interrupted export leaves `path`.partial behind and `path`
    unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config = json.dumps(config_entries(shape, eos_ids), indent=2)
        (partial / "config.json").write_text(config + "\n")
        write_text_files(partial, tokenizer, model, eos_ids)
    save_weights(partial, weights, shape, write)
    if write:
        sync_directory(partial)  # before the rename marks it complete
        _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    """Rename the directory; into an existing one, which may hold other files, move file by file."""
    if not path.exists():
        partial.rename(path)
        return
    remove_older_model(path, kept={file.name for file in partial.iterdir()} - {SINGLE, INDEX})
    for file in partial.iterdir():
        file.replace(path / file.name)
    partial.rmdir()
