"""`samples.jsonl.gz`: the rollouts that a run keeps, written by a thread, and read again.

The file is a sequence of gzip members, each with the lines of a group. It is only appended to, so
that a prefix which ends with a member is a whole file: what a checkpoint holds. The texts of
tokens, JSON and compression are the thread's work. A step waits for it only where the thread is
many steps behind; a checkpoint, for what came before it.
"""

from __future__ import annotations

import gzip
import json
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress, groupby
from pathlib import Path
from typing import Any, BinaryIO

from mesh.runs.lines import line_of, lines_in, read_lines
from mesh.runs.thinning import TRAIN, Kind, Thinning

SAMPLES, OLD_SAMPLES = "samples.jsonl.gz", "samples.jsonl"
"""The file of a run, and of runs from before it was compressed."""

WAITING = 200  # steps and marks, of which a step has two, that the thread may be behind
CHUNK_BYTES = 1 << 16
COMPRESSION = 6  # zlib's default: the last percent takes twice the time
Row = dict[str, Any]
Seen = Callable[[Sequence[Row]], None]


Step = tuple[int, Sequence[Row], Seen]
"""A step, its records, and who gets their rows."""


def ignored(rows: Sequence[Row]) -> None:
    """Nobody gets the rows."""


class Mark:
    """A place in the file: behind everything that was put into it before."""

    def __init__(self) -> None:
        self._done, self._size, self._error = threading.Event(), 0, ""

    def size(self, seconds: float | None = None) -> int:
        """Bytes of the file up to here, once they are written. RuntimeError if they could not be;
        TimeoutError after so many seconds."""
        if not self._done.wait(seconds):
            raise TimeoutError(f"{SAMPLES} was not written within {seconds:g} s")
        if self._error:
            raise RuntimeError(self._error)
        return self._size

    def reach(self, size: int, error: str) -> None:
        """Tell who waits."""
        self._size, self._error = size, error
        self._done.set()


class SampleFile:
    """Owns the file and its thread. A failure to write is raised by the next call."""

    def __init__(
        self,
        path: Path,
        row_of: Callable[[Row], Row],
        thinning: Thinning,
    ) -> None:
        """row_of: makes the line of a record; thinning: says what the file keeps."""
        self.path, self.left_out = path, 0
        self._row_of, self._thinning = row_of, thinning
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115
        self._size, self._error = self._file.tell(), ""
        self._queue: queue.Queue[Step | Mark | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="mesh-samples", daemon=True)
        self._thread.start()

    def put(self, step: int, records: Sequence[Row], seen: Seen = ignored) -> None:
        """Have the records of a step written; the rollouts of a group follow each other. seen: is
        called with all rows of the step, by the thread."""
        self._ask((step, records, seen))

    def mark(self) -> Mark:
        """The place behind what was put so far. Returns at once."""
        mark = Mark()
        self._ask(mark)
        return mark

    def close(self, seconds: float | None = None) -> None:
        """Write the rest, and close the file; after so many seconds give it up."""
        self._queue.put(None, timeout=seconds)
        self._thread.join(seconds)
        self._check()

    def _ask(self, what: Step | Mark) -> None:
        self._check()
        self._queue.put(what)

    def _check(self) -> None:
        if self._error:
            raise RuntimeError(self._error)

    def _run(self) -> None:
        with self._failing("cannot be read"):
            self._recall()
        while (what := self._queue.get()) is not None:
            if isinstance(what, Mark):
                what.reach(self._size, self._error)
            elif not self._error:
                step, records, seen = what
                with self._failing(f"step {step} cannot be written"):
                    seen(self._write(step, records))
        self._file.close()

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Keep an error, as a thread has nobody to raise it to."""
        try:
            yield
        except OSError as error:
            self._error = f"{self.path}: cannot be written ({error.strerror})"
        except Exception as error:
            self._error = f"{self.path}: {what} ({error!r})"

    def _recall(self) -> None:
        """Tell what was kept before a resumed run."""
        for content in members(self.path) if self._size else ():
            row = json.loads(content[: content.index(b"\n")])
            self._thinning.kept(kind_of(row), row["step"])

    def _write(self, step: int, records: Sequence[Row]) -> list[Row]:
        rows = [{"step": step} | self._row_of(record) for record in records]
        groups = [list(group) for _, group in groupby(rows, key=group_of)]
        made = [member_of(group) for group in groups]
        sizes = [(kind_of(group[0]), len(data)) for group, data in zip(groups, made, strict=True)]
        chosen = self._thinning.choose(step, self._size, sizes)
        self._append(b"".join(compress(made, chosen)))
        self.left_out += chosen.count(False)
        return rows

    def _append(self, data: bytes) -> None:
        written = 0
        while written < len(data):
            written += self._file.write(data[written:]) or 0
        self._size += len(data)


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What a row is of: training, or an evaluation set."""
    return row.get("split") or TRAIN, row.get("set") or ""


def group_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The group of a row, within a step."""
    return row.get("split"), row.get("set"), row.get("prompt_id")


def member_of(rows: Sequence[Row]) -> bytes:
    """The rows as a gzip member, the same bytes whenever it is made."""
    text = "".join(f"{line_of(row)}\n" for row in rows)
    return gzip.compress(text.encode(), COMPRESSION, mtime=0)


def read_samples(run_dir: Path, killed: bool = False) -> list[Row]:
    """The samples of a run, of one from before they were compressed too; a field that is null is
    left out.

    killed: ignore a last member, or line, that was not written to its end. Raises ValueError naming
    the file that cannot be read.
    """
    path, old = run_dir / SAMPLES, run_dir / OLD_SAMPLES
    before = read_lines(old, killed) if old.exists() else []
    rows = [{"split": "train", "set": ""} | row for row in before]
    if path.exists() or not before:
        rows += lines_in(b"".join(members(path, killed)), path)
    return [without_nulls(row) for row in rows]


def without_nulls(row: Mapping[str, Any]) -> Row:
    """A row without the fields that it has no value of."""
    return {name: value for name, value in row.items() if value is not None}


def members(path: Path, killed: bool = False) -> Iterator[bytes]:
    """The contents of a file's gzip members, in order. Raises ValueError if one is damaged, or,
    unless `killed`, the last one is truncated."""
    try:
        with open(path, "rb") as file:
            yield from _members(file, path, killed)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name the directory of a run") from error


def _members(file: BinaryIO, path: Path, killed: bool) -> Iterator[bytes]:
    piece = file.read(CHUNK_BYTES)
    while piece:
        content, member = [], zlib.decompressobj(wbits=31)
        while piece and not member.eof:
            try:
                content.append(member.decompress(piece))
            except zlib.error as error:
                raise ValueError(f"{path}: is damaged ({error})") from error
            piece = member.unused_data or file.read(CHUNK_BYTES)
        if not member.eof:
            if killed:
                return
            remedy = "a killed run may leave it so, which resume= removes"
            raise ValueError(f"{path}: its last part is truncated; {remedy}")
        yield b"".join(content)
