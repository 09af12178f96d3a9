"""Files of JSON lines as far as they can be read: plain or gzip, half-written, damaged.

A run that is going on, or was killed, ends its files anywhere; a full disk or a bad copy leaves
holes. What cannot be read is counted and said in words, not raised.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
CHUNK = 1 << 20
GZIP = b"\x1f\x8b\x08"
MOST_LINE = 64 << 20  # a longer line is damage, not a record


class Damage:
    """What of one file could not be read, for `Run.missing`."""

    def __init__(self, name: str):
        self.name = name
        self.lines = 0
        self.truncated = False
        self.unreadable = ""
        self.gaps = 0

    def sentences(self) -> list[str]:
        """One sentence per kind of damage."""
        found = []
        if self.unreadable:
            found.append(f"{self.name} cannot be read ({self.unreadable}).")
        if self.gaps:
            found.append(f"{self.name} is damaged: {counted(self.gaps, 'part')} left out.")
        if self.lines:
            wrong = f"{counted(self.lines, 'line')} left out that"
            verb = "is no complete record" if self.lines == 1 else "are no complete records"
            found.append(f"{self.name} is damaged: {wrong} {verb}.")
        if self.truncated:
            why = "a run that is going on or was killed leaves one"
            found.append(f"{self.name} ends in half a line, which is left out; {why}.")
        return found


def counted(number: int, noun: str) -> str:
    """`1 line was`, `3 lines were`."""
    return f"1 {noun} was" if number == 1 else f"{number:,} {noun}s were"


def raw_lines(path: Path, damage: Damage) -> Iterator[bytes]:
    """The complete lines of a file, without their newlines."""
    held = b""
    for chunk in chunks(path, damage):
        *lines, held = (held + chunk).split(b"\n")
        yield from lines
        if len(held) > MOST_LINE:
            damage.lines, held = damage.lines + 1, b""
    damage.truncated = bool(held.strip())


def records(lines: Iterable[bytes], damage: Damage) -> Iterator[Line]:
    """The JSON objects of lines that have a step."""
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


def chunks(path: Path, damage: Damage) -> Iterator[bytes]:
    """The bytes of a file, decompressed if it is gzip, as far as they can be read."""
    try:
        with open(path, "rb") as file:
            if file.read(3) != GZIP:
                file.seek(0)
                yield from iter(lambda: file.read(CHUNK), b"")
                return
            file.seek(0)
            yield from inflated(iter(lambda: file.read(CHUNK), b""), damage)
    except OSError as error:
        damage.unreadable = error.strerror or str(error)


def inflated(blocks: Iterator[bytes], damage: Damage) -> Iterator[bytes]:
    """The content of gzip members. A damaged one is skipped up to the next beginning of one; a
    last one that is cut gives what it has."""
    member, held, lost = zlib.decompressobj(31), b"", False
    for block in blocks:
        held += block
        while held:
            if lost:
                place = held.find(GZIP)
                lost, held = place < 0, held[place if place >= 0 else -2 :]
                if lost:
                    break
            try:
                content = member.decompress(held, CHUNK)
            except zlib.error:
                damage.gaps += 1
                yield b"\n"  # half a line is no line
                member, held, lost = zlib.decompressobj(31), held[1:], True
                continue
            if content:
                yield content
            held = member.unconsumed_tail
            if member.eof:
                held = member.unused_data
                member = zlib.decompressobj(31)
