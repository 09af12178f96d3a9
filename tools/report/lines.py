"""Files of JSON lines as far as they can be read: plain or gzip, half-written, damaged.

A run that is going on, or was killed, ends its files anywhere; a full disk or a bad copy leaves
holes. What cannot be read is counted and said in words, not raised. A file is read in blocks, each
of which can be found again by its place: a gzip member, or a piece of a plain file that ends with a
line.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

Line = dict[str, Any]
CHUNK = 1 << 16
GZIP = b"\x1f\x8b\x08"
MOST_BLOCK = 512 << 20  # a longer line or member is damage


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, where they begin in it and where they end."""

    offset: int
    end: int
    content: bytes

    @property
    def lines(self) -> list[bytes]:
        return self.content.split(b"\n")


class Damage:
    """What of one file could not be read, for `Run.missing`."""

    def __init__(self, name: str):
        self.name = name
        self.lines = 0
        self.gaps = 0
        self.truncated = False
        self.unreadable = ""

    def sentences(self) -> list[str]:
        """One sentence per kind of damage."""
        found = []
        if self.unreadable:
            found.append(f"{self.name} cannot be read ({self.unreadable}).")
        if self.gaps:
            found.append(f"{self.name} is damaged: {were(self.gaps, 'part')} left out.")
        if self.lines:
            verb = "is no complete record" if self.lines == 1 else "are no complete records"
            lines = f"{were(self.lines, 'line')} left out that {verb}"
            found.append(f"{self.name} is damaged: {lines}.")
        if self.truncated:
            why = "a run that is going on or was killed leaves such an end"
            found.append(f"{self.name} ends in half a record, which is left out; {why}.")
        return found


def were(number: int, noun: str) -> str:
    """`1 line was`, `3 lines were`."""
    return f"1 {noun} was" if number == 1 else f"{number:,} {noun}s were"


def records(path: Path, damage: Damage) -> Iterator[Line]:
    """The JSON objects of a file that have a step."""
    for block in blocks(path, damage):
        yield from records_in(block.lines, damage)


def records_in(lines: Iterable[bytes], damage: Damage) -> Iterator[Line]:
    """The JSON objects of lines that have a step; others are counted, empty lines are not."""
    for line in lines:
        record = parsed(line)
        if record is not None:
            yield record
        elif line.strip():
            damage.lines += 1


def parsed(line: bytes) -> Line | None:
    """The JSON object of a line; None where it is none, or has no step that counts."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_step(record.get("step")):
        return None
    return record


def is_step(value: Any) -> bool:
    """True for a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def blocks(path: Path, damage: Damage, start: int = 0) -> Iterator[Block]:
    """The blocks of a file from the place `start`, at which one begins, as far as they can be
    read; of a file that ends within a block or a line, without that."""
    try:
        with open(path, "rb") as file:
            compressed = file.read(3) == GZIP
            file.seek(start)
            yield from (members if compressed else pieces)(file, start, damage)
    except OSError as error:
        damage.unreadable = error.strerror or str(error)


def pieces(file: BinaryIO, start: int, damage: Damage) -> Iterator[Block]:
    """Pieces of a plain file, each of which ends with a line."""
    held: list[bytes] = []
    while chunk := file.read(CHUNK):
        whole, newline, rest = chunk.rpartition(b"\n")
        if newline:
            content = b"".join([*held, whole, newline])
            yield Block(start, start + len(content), content)
            start, held = start + len(content), []
        held.append(rest)
        if len(held) * CHUNK > MOST_BLOCK:
            damage.gaps, start, held = damage.gaps + 1, start + sum(map(len, held)), []
    damage.truncated = bool(b"".join(held).strip())


def members(file: BinaryIO, start: int, damage: Damage) -> Iterator[Block]:
    """Members of a gzip file. After a damaged one comes the next that can be found."""
    size = file.seek(0, 2)
    while start < size:
        file.seek(start)
        try:
            content, length = member(file)
        except (zlib.error, MemoryError):
            damage.gaps += 1
            start = next_member(file, start + 1, size)
            continue
        except EOFError:
            damage.truncated = True
            return
        yield Block(start, start + length, content)
        start += length


def member(file: BinaryIO) -> tuple[bytes, int]:
    """The content of the gzip member at the file's place, and its length. Raises EOFError where
    the file ends within it, MemoryError where it is too long, zlib.error where it is damaged."""
    inflate, parts, read, total = zlib.decompressobj(31), [], 0, 0
    while not inflate.eof:
        chunk = file.read(CHUNK)
        if not chunk:
            raise EOFError
        read += len(chunk)
        while chunk:
            parts.append(inflate.decompress(chunk, MOST_BLOCK))
            total += len(parts[-1])
            if total > MOST_BLOCK:
                raise MemoryError
            chunk = inflate.unconsumed_tail
    return b"".join(parts), read - len(inflate.unused_data)


def next_member(file: BinaryIO, start: int, size: int) -> int:
    """Where a member may begin from `start` on; `size`: nowhere."""
    file.seek(start)
    held = b""
    while chunk := file.read(CHUNK):
        held = held[-2:] + chunk
        if (place := held.find(GZIP)) >= 0:
            return file.tell() - len(held) + place
    return size
