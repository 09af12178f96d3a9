"""The safetensors files of a model directory: which they are, and the tensors that they hold.

Headers and index are input from outside. All of them is checked before a tensor is read, so that
what is wrong is named by file, and a number of the header never becomes an address or a size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.lifecycle.json_files import object_of, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MOST_HEADER_BYTES = 100_000_000  # as in the safetensors library
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of an element of dtypes that share bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, as the header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(path: Path) -> list[Path]:
    """Safetensors files of a directory: the single one if it exists, as in `transformers`, else
    all that the index names. Raises ValueError if there is neither, or the index is damaged.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise ValueError(f"there is neither {SINGLE} nor {INDEX}")
    return [path / name for name in sorted(set(weight_map(path).values()))]


def weight_map(path: Path) -> dict[str, str]:
    """File of every tensor, by the index of a directory. Raises ValueError if it names anything but
    files beside it.

    A file may be a symbolic link to elsewhere, as in Hugging Face's cache: the index cannot make
    one.
    """
    entries = read_object(path / INDEX).get("weight_map")
    if not isinstance(entries, dict):
        raise ValueError(f"{INDEX} has no weight_map")
    for tensor, name in entries.items():
        if not is_file_name(name):
            raise ValueError(
                f"{INDEX} places {tensor} in {name!r}, which is not the name of a file beside it"
            )
    return entries


def is_file_name(name: Any) -> bool:
    """True for a name that cannot lead out of its directory."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return not any(character in name for character in "/\\\0")


def stored_tensors(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """(tensors of a directory's weight files by name, damage of these files)."""
    stored: dict[str, Stored] = {}
    wrong: list[str] = []
    try:
        files = weight_files(path)
    except ValueError as error:
        return {}, [str(error)]
    for file in files:
        try:
            held = header_of(file)
        except ValueError as error:
            wrong.append(str(error))
            continue
        wrong += [
            f"{name} is in {stored[name].file.name} and again in {file.name}"
            for name in sorted(held.keys() & stored.keys())[:1]
        ]
        stored |= held
    if not wrong and files != [path / SINGLE]:
        wrong += _misplaced(weight_map(path), stored)
    return stored, wrong


def _misplaced(index: dict[str, str], stored: dict[str, Stored]) -> list[str]:
    """Disagreement of the index with the files: the first tensor, and how many there are."""
    found = [
        f"{INDEX} places {name} in {file}, which does not hold it"
        for name, file in sorted(index.items())
        if name not in stored or stored[name].file.name != file
    ]
    found += [
        f"{INDEX} leaves out {name}, which is in {stored[name].file.name}"
        for name in sorted(stored.keys() - index.keys())
    ]
    more = f" (and {len(found) - 1} more disagree)" if len(found) > 1 else ""
    return [found[0] + more] if found else []


def header_of(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises ValueError that names the file if it is missing, is truncated, or its header contradicts
    itself: what the safetensors library would refuse. Layout: header length, JSON header, data
    (https://huggingface.co/docs/safetensors, "Format").
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            sane = 8 + length <= size and length <= MOST_HEADER_BYTES
            text = handle.read(length) if sane else b""
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror})") from error
    if not text:
        raise ValueError(f"{file.name} is not a safetensors file, or is truncated")
    try:
        header = object_of(text)
    except ValueError as error:
        raise ValueError(f"the header of {file.name} {error}") from error
    notes = header.pop("__metadata__", None)
    notes = {} if notes is None else notes
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError(f"the header of {file.name} has a __metadata__ that is not all text")
    spans = {name: _span(file, name, item) for name, item in header.items()}
    _check_spans(file, spans, size, 8 + length)
    return {name: Stored(file, x["dtype"], tuple(x["shape"])) for name, x in header.items()}


def _span(file: Path, name: str, item: Any) -> tuple[int, int]:
    """Where a tensor's bytes are. Raises ValueError if that contradicts its dtype and shape."""
    place = f"{file.name}: the header's entry of {name}"
    if not isinstance(item, dict) or not item.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{place} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in {*ITEM_BYTES, *PACKED}:
        raise ValueError(f"{place} has the unknown dtype {dtype!r}")
    if not _are_counts(shape) or math.prod(max(n, 1) for n in shape) >= 1 << 56:
        raise ValueError(f"{place} has the shape {shape}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{place} has data_offsets {offsets}")
    bits = PACKED.get(dtype) or 8 * ITEM_BYTES[dtype]
    begin, end = offsets
    if 8 * (end - begin) != math.prod(shape) * bits:
        raise ValueError(
            f"{place} has {end - begin} bytes (data_offsets {offsets}), which is not {dtype} of "
            f"shape {shape}"
        )
    return begin, end


def _are_counts(items: Any) -> bool:
    return isinstance(items, list) and all(type(item) is int and item >= 0 for item in items)


def _check_spans(file: Path, spans: dict[str, tuple[int, int]], size: int, data: int) -> None:
    """Raises ValueError unless the tensors fill a file of `size` bytes, whose data begins at byte
    `data`, without holes and overlaps.
    """
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            raise ValueError(
                f"{file.name}: by the header {name} begins at byte {begin} of the data, and what "
                f"is before it ends at byte {position}"
            )
        position = end
    if data + position != size:
        raise ValueError(f"{file.name} has {size} bytes instead of {data + position}")
