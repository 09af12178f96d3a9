"""On-disk format of a checkpoint: safetensors files of blocks, and an index that names them.

Not torch.distributed.checkpoint: its .metadata file is a pickle, which executes code on load. Here
every rank writes the blocks of which it is the first holder, so that each element is written once;
the index records where each block is, with the length and SHA-256 of every file and of itself. A
rank of any other mesh reads the intersection of its blocks with the stored ones, by the same plan
that reshards weights (`mesh/layout/reshard.py`).

Files are always created (an existing file or link is an error), but for the copy of the logs, under
the user's umask, and are on disk before their checksum counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mesh.layout.reshard import Block, Copy, ParamLayout, plan
from mesh.lifecycle.files import sync_path
from mesh.lifecycle.heartbeat import heartbeat
from mesh.model.safetensors_files import header_of, is_file_name

FORMAT = 5  # of the index and the files; raise it with every incompatible change
READABLE = (3, 4, FORMAT)  # with a copy of the logs in each; 3 without the best model's metric
INDEX = "index.json"
READ_BYTES = 1 << 22
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in a file; weights, moments and averages are fp32."""


@dataclass(frozen=True)
class Entry:
    """A file's length, SHA-256 and block of each parameter in it (a log has none)."""

    bytes: int
    sha256: str
    blocks: dict[str, Block]


@dataclass(frozen=True)
class Best:
    """Step and value of the best evaluation so far, by a metric of its own."""

    step: int
    value: float
    metric: str = "eval/accuracy"  # the only one of format 3


@dataclass(frozen=True)
class Index:
    """Contents of a checkpoint's index. `updates`: those that changed the weights;
    `without_signal`: steps that made none, as their gradients were 0. `digests`: one
    mesh-independent digest per kind of state; `shapes`: each parameter's global shape; `files`:
    entries by file name; `best` names the model in RUN_DIR/best that was the best at that step;
    `inputs`: what the run computes with (`same_run.py`), empty in those of older versions;
    `optimizer`: plain values of the state of a user's optimizer (`state.py`)."""

    step: int
    updates: int
    seed: int
    digests: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Entry]
    best: Best | None = None
    without_signal: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def layouts(self, own: bool = False) -> list[ParamLayout]:
        """Layouts of the stored blocks; the "ranks" number the files, sorted by name. own: those of
        the tensors of a user's optimizer (`KEY/WEIGHT`), else those of the weights."""
        files = enumerate(self.files[name] for name in sorted(self.files))
        blocks: dict[str, dict[int, Block]] = defaultdict(dict)
        for number, entry in files:
            for name, block in entry.blocks.items():
                blocks[name][number] = block
        shapes = {name: x for name, x in self.shapes.items() if ("/" in name) == own}
        return [ParamLayout(n, shape, blocks[n]) for n, shape in sorted(shapes.items())]

    def to_json(self) -> str:
        content = {"format": FORMAT} | asdict(self)
        return json.dumps({"content": content, "sha256": _sha256_of(content)}) + "\n"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write contiguous CPU tensors as one safetensors file; returns (length, SHA-256) of the
    intended bytes. Layout: https://huggingface.co/docs/safetensors, "Format"."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype in DTYPES and tensor.is_contiguous(), f"{name}: {tensor.dtype}"
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    digest, length = hashlib.sha256(), 8 + len(text) + end
    pieces: list[Any] = [len(text).to_bytes(8, "little"), text]
    flat = (tensor.view(-1).view(torch.uint8) for tensor in tensors.values())
    pieces += [tensor.numpy().data for tensor in flat]
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            heartbeat()
        flush(file)
    return length, digest.hexdigest()


class OtherFormat(RuntimeError):
    """A checkpoint of another version: intact, and not to be set aside."""


def write_index(path: Path, index: Index) -> None:
    """Write `path/index.json`, which completes the directory."""
    with open(path / INDEX, "x") as file:
        file.write(index.to_json())
        flush(file)
    sync_path(path)


def read_index(path: Path) -> Index:
    """Read the index of a checkpoint's directory. Raises ValueError if it is damaged, OtherFormat
    or OSError if it may be intact but cannot be read here."""
    if path.is_symlink():
        raise ValueError("is a symbolic link, which is not followed")
    try:
        stored = json.loads(_read(path / INDEX))
        content = stored["content"]
        if (version := content.get("format", 1)) not in READABLE:
            wrong = f"{path} has checkpoint format {version}, this version of mesh reads {FORMAT}"
            remedy = "resume with the version that wrote it, or start a new run"
            raise OtherFormat(f"{wrong}; {remedy}")
        if stored["sha256"] != _sha256_of(content):
            raise ValueError(f"the checksum of {INDEX} is wrong")
        return _index_of(content)
    except OSError as error:
        _reraise_unless_damage(error)
        raise ValueError(f"{INDEX}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is not the index of a checkpoint, or is truncated") from error


def _index_of(content: Mapping[str, Any]) -> Index:
    files = {}
    for name, entry in content["files"].items():
        if not is_file_name(name):
            raise ValueError(f"{INDEX} names {name!r}, which is outside the checkpoint")
        files[name] = entry_of(entry)
    shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
    step, updates, seed = content["step"], content["updates"], content["seed"]
    best = None if content["best"] is None else Best(**content["best"])
    digests, inputs = content["digests"], content.get("inputs", {})
    without_signal = content.get("without_signal", 0)  # older checkpoints did not count them
    optimizer = content.get("optimizer", {})
    return Index(
        step, updates, seed, digests, shapes, files, best, without_signal, inputs, optimizer
    )


def entry_of(stored: Mapping[str, Any]) -> Entry:
    """An entry that was written as JSON."""
    blocks = {
        parameter: Block(tuple(block["offset"]), tuple(block["size"]))
        for parameter, block in stored["blocks"].items()
    }
    return Entry(stored["bytes"], stored["sha256"], blocks)


def file_problem(path: Path, entry: Entry, whole: bool = True) -> str | None:
    """Damage of a file that an index names: missing, a link, truncated, other bytes. None: it is
    intact. Not whole: more may follow. Raises OSError if it cannot be read."""
    digest, length = hashlib.sha256(), 0
    try:
        with open(path, "rb", opener=no_link) as file:
            while piece := file.read(
                READ_BYTES if whole else min(READ_BYTES, entry.bytes - length)
            ):
                digest.update(piece)
                heartbeat()
                length += len(piece)
    except OSError as error:
        _reraise_unless_damage(error)
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
    """Fill one rank's local tensors `state[kind][name]` from a checkpoint of any mesh.

    Raises ValueError naming the parameters if it holds others than `layouts`, or only part of one,
    and naming the file if its header is not what the index says.
    """
    mine = [
        ParamLayout(
            layout.name, layout.shape, {r: layout.blocks[r] for r in layout.blocks if r == rank}
        )
        for layout in layouts
    ]
    by_file: dict[int, list[Copy]] = defaultdict(list)
    for copy in plan(index.layouts(own=any("/" in layout.name for layout in layouts)), mine):
        by_file[copy.src_rank].append(copy)
    names = sorted(index.files)
    for number, copies in by_file.items():
        _check_header(path / names[number], index.files[names[number]], state)
        with safe_open(path / names[number], framework="pt") as handle:
            for kind, tensors in state.items():
                for copy in copies:
                    heartbeat()
                    stored = _stored(handle, f"{kind}/{copy.name}", copy.source)
                    tensors[copy.name][copy.destination.slices].copy_(stored)


def _stored(handle: Any, name: str, block: Block) -> torch.Tensor:
    """A block of a stored tensor; slices of a scalar are not theirs to give."""
    return handle.get_slice(name)[block.slices] if block.size else handle.get_tensor(name)


def _check_header(
    file: Path, entry: Entry, state: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    held = header_of(file)
    for name, block in entry.blocks.items():
        for kind, tensors in state.items():
            if name not in tensors:  # of other kinds
                continue
            stored, dtype = held.get(f"{kind}/{name}"), DTYPES[tensors[name].dtype]
            if stored is None or (stored.dtype, stored.shape) != (dtype, block.size):
                wrong = "nothing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
                raise ValueError(
                    f"{file}: {INDEX} says {dtype} {list(block.size)} of {kind}/{name}, and there "
                    f"is {wrong}"
                )


def flush(file: Any) -> None:
    """Flush a file's bytes to disk."""
    file.flush()
    os.fsync(file.fileno())


def no_link(path: str, flags: int) -> int:
    """Opener for `open` that refuses symbolic links."""
    return os.open(path, flags | os.O_NOFOLLOW)


def _reraise_unless_damage(error: OSError) -> None:
    """Re-raise unless the file is missing, a link or a directory: a disk that cannot be read now
    does not make a checkpoint damaged."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        raise error


def _read(path: Path) -> str:
    with open(path, opener=no_link) as file:
        return file.read()


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
