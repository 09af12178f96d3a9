"""What lies in a checkpoint's directory: safetensors files of blocks, and an index that names them.

Not torch.distributed.checkpoint: its .metadata file is a pickle, which runs code when it is loaded.
Here every rank writes the blocks of which it is the first holder, so that each element is written
once; the index says which block lies where, with the length and the SHA-256 of every file and of
itself. A rank of any other mesh reads what its own blocks have in common with the stored ones,
by the same plan that moves weights between meshes (`mesh/layout/reshard.py`).

Files are created anew (an existing file or link is an error) under the user's umask, and reach the
disk before their checksum counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mesh.layout.reshard import Block, Copy, ParamLayout, plan
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.heartbeat import beat

FORMAT = 3
INDEX = "index.json"
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A file: its length, its SHA-256, and the block of each parameter that is in it (of a rank's
    file; a log has none)."""

    bytes: int
    sha256: str
    blocks: dict[str, Block]


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: after which step, and its value."""

    step: int
    value: float


@dataclass(frozen=True)
class Index:
    """All that a checkpoint says of itself. `updates`: steps that changed the weights, fewer than
    `step` where some were skipped. `digests` has a mesh-independent number for each kind of state,
    `shapes` each parameter's whole shape, `files` an entry by file name; `best` names the model in
    RUN_DIR/best that was the best one at that step."""

    step: int
    updates: int
    seed: int
    digests: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Entry]
    best: Best | None = None

    def layouts(self) -> list[ParamLayout]:
        """Where each parameter's blocks lie; the "ranks" count the files, sorted by name."""
        files = enumerate(self.files[name] for name in sorted(self.files))
        blocks: dict[str, dict[int, Block]] = defaultdict(dict)
        for number, entry in files:
            for name, block in entry.blocks.items():
                blocks[name][number] = block
        return [ParamLayout(n, shape, blocks[n]) for n, shape in sorted(self.shapes.items())]

    def to_json(self) -> str:
        content = {"format": FORMAT} | asdict(self)
        return json.dumps({"content": content, "sha256": _sha256_of(content)}) + "\n"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write contiguous fp32 CPU tensors as one safetensors file; (length, SHA-256) of what was
    meant to be written. Its form: https://huggingface.co/docs/safetensors, "Format"."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), f"{name}: {tensor.dtype}"
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    digest, length = hashlib.sha256(), 8 + len(text) + end
    pieces: list[Any] = [len(text).to_bytes(8, "little"), text]
    pieces += [tensor.numpy().reshape(-1).data for tensor in tensors.values()]
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            beat()
        flush(file)
    return length, digest.hexdigest()


def write_index(path: Path, index: Index) -> None:
    """Write `path/index.json`, after which the directory is whole."""
    with open(path / INDEX, "x") as file:
        file.write(index.to_json())
        flush(file)
    sync_path(path)


def read_index(path: Path) -> Index:
    """The index of a checkpoint's directory. Raises ValueError that says what is wrong with it;
    RuntimeError or OSError where it may be whole and cannot be read here."""
    if path.is_symlink():
        raise ValueError("is a symbolic link, which is not followed")
    try:
        stored = json.loads(_read(path / INDEX))
        content = stored["content"]
        if content["format"] != FORMAT:
            wrong = f"{path} has format {content['format']}, this program reads {FORMAT}"
            raise RuntimeError(f"{wrong}; resume it with the program that wrote it")
        if stored["sha256"] != _sha256_of(content):
            raise ValueError(f"the checksum of {INDEX} is wrong")
        return _index_of(content)
    except OSError as error:
        _only_damage(error)
        raise ValueError(f"{INDEX}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is not the index of a checkpoint, or was cut short") from error


def _index_of(content: Mapping[str, Any]) -> Index:
    files = {}
    for name, entry in content["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{INDEX} names {name!r}, which lies elsewhere")
        blocks = {
            parameter: Block(tuple(block["offset"]), tuple(block["size"]))
            for parameter, block in entry["blocks"].items()
        }
        files[name] = Entry(entry["bytes"], entry["sha256"], blocks)
    shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
    step, updates, seed = content["step"], content["updates"], content["seed"]
    best = None if content["best"] is None else Best(**content["best"])
    return Index(step, updates, seed, content["digests"], shapes, files, best)


def file_problem(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file that an index names: missing, a link, cut short, other bytes.
    OSError where it cannot be read."""
    digest, length = hashlib.sha256(), 0
    try:
        with open(path, "rb", opener=no_link) as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
                beat()
                length += len(piece)
    except OSError as error:
        _only_damage(error)
        return f"{path.name}: {error.strerror}"
    if length != entry.bytes:
        return f"{path.name} has {length} bytes instead of {entry.bytes}"
    return None if digest.hexdigest() == entry.sha256 else f"the checksum of {path.name} is wrong"


@torch.no_grad()
def read_blocks(
    path: Path,
    index: Index,
    state: Mapping[str, Mapping[str, torch.Tensor]],
    layouts: Sequence[ParamLayout],
    rank: int,
) -> None:
    """Fill one rank's local tensors `state[kind][name]`, whatever mesh wrote the checkpoint.

    Raises ValueError naming the parameters where it holds others than `layouts`, or not all of one.
    """
    mine = [
        ParamLayout(
            layout.name, layout.shape, {r: layout.blocks[r] for r in layout.blocks if r == rank}
        )
        for layout in layouts
    ]
    by_file: dict[int, list[Copy]] = defaultdict(list)
    for copy in plan(index.layouts(), mine):
        by_file[copy.src_rank].append(copy)
    names = sorted(index.files)
    for number, copies in by_file.items():
        with safe_open(path / names[number], framework="pt") as handle:
            for kind, tensors in state.items():
                for copy in copies:
                    beat()
                    stored = handle.get_slice(f"{kind}/{copy.name}")[copy.source.slices]
                    tensors[copy.name][copy.destination.slices].copy_(stored)


def flush(file: Any) -> None:
    """Have a file's bytes on the disk."""
    file.flush()
    os.fsync(file.fileno())


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that refuses a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW)


def _only_damage(error: OSError) -> None:
    """Raise it again unless it says that a file is not there, or is a link or a directory: a disk
    that cannot be read now is no reason to set a checkpoint aside."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        raise error


def _read(path: Path) -> str:
    with open(path, opener=no_link) as file:
        return file.read()


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
