"""The rows of a data set, wherever they lie, each as a mapping and with its place in a message.

JSON is read as it was written: `datasets` would give all rows the columns of each, and refuse a
column with numbers in some of them, without a line. Of a file of JSON Lines only the offsets of
its rows are kept. Everything else is read by `datasets`, which is slow to import: only where it is
needed.
"""

from __future__ import annotations

import bisect
import json
import mmap
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from mesh.config.schema import resolve_path

Row = Mapping[str, Any]
MOST_SHOWN = 3
"""Rows that a refusal names of those with one fault."""

LINES, TABLES = (".jsonl", ".ndjson", ".json"), (".parquet",)
SUFFIXES = (*LINES, *TABLES)
READ = f"JSON Lines, JSON and Parquet files ({', '.join(SUFFIXES)})"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Rows(Protocol):
    """Rows by number, from 0."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that any row has."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def place(self, index: int) -> str:
        """The place of a row: `train.jsonl, line 5`."""
        ...


class JsonLines:
    """A file of one JSON object a line; empty lines are no rows. Raises ValueError that names the
    lines which are none."""

    def __init__(self, path: Path) -> None:
        self.path, columns, wrong = path, dict[str, None](), []
        self._starts, self._lines = array("Q"), array("Q")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 3 if self._bytes[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark
        self._bytes.seek(start)
        for number, line in enumerate(iter(self._bytes.readline, b""), start=1):
            if line.strip():
                self._starts.append(start)
                self._lines.append(number)
                try:
                    columns.update(dict.fromkeys(json_object(line)))
                except ValueError as error:
                    wrong.append(f"{path}, line {number}: {error}")
            start += len(line)
        self._starts.append(start)
        self.columns = list(columns)
        if wrong:
            raise ValueError(listed(wrong, "a row is one JSON object; correct or remove it"))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        return json_object(self._bytes[self._starts[index] : self._starts[index + 1]])

    def place(self, index: int) -> str:
        return f"{self.path.name}, line {self._lines[index]}"


class JsonArray:
    """A file of one JSON list of objects."""

    def __init__(self, path: Path, items: list[Any]) -> None:
        self.path, self.items = path, items
        wrong = [
            f"{path}, item {number}: it is {kind_of(item)}, not an object"
            for number, item in enumerate(items)
            if not isinstance(item, dict)
        ]
        if wrong:
            raise ValueError(listed(wrong, "a row is one JSON object; correct or remove it"))
        self.columns = list(dict.fromkeys(name for item in items for name in item))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row:
        return self.items[index]

    def place(self, index: int) -> str:
        return f"{self.path.name}, item {index}"


class Table:
    """A data set of the `datasets` library."""

    def __init__(self, name: str, data: Any) -> None:
        self.name, self.data, self.columns = name, data, list(data.column_names)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        return self.data[index]

    def place(self, index: int) -> str:
        return f"{self.name}, row {index}"


class Joined:
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))
        self.columns = list(dict.fromkeys(name for part in parts for name in part.columns))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        part, index = self._at(index)
        return part[index]

    def place(self, index: int) -> str:
        part, index = self._at(index)
        return part.place(index)

    def _at(self, index: int) -> tuple[Rows, int]:
        which = bisect.bisect_right(self.ends, index)
        return self.parts[which], index - (self.ends[which - 1] if which else 0)


def read_rows(path: str, split: str, subset: str) -> Rows:
    """The rows of a file, or of one split of a directory or a hub name. Raises ValueError that says
    what is wrong with it.
    """
    place = resolve_path(path)
    if place.is_file():
        rows = of_file(place)
    elif place.is_dir():
        rows = of_directory(place, split, subset)
    elif HUB_NAME.fullmatch(path) and not path.endswith(SUFFIXES):
        rows = of_hub(path, split, subset)
    else:
        raise ValueError(f"{path} is no file and no directory here; correct the path")
    if not len(rows):
        raise ValueError(f"{path} has no row{f' in {split}' * place.is_dir()}; name one that has")
    return rows


def of_file(path: Path) -> Rows:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: what is read are {READ}; convert it, or give it its suffix")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; name a file with rows")
    if path.suffix in TABLES:
        return of_parquet(path)
    if path.suffix != ".json" or not begins_list(path):
        return JsonLines(path)
    try:
        items = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); correct it") from error
    return JsonArray(path, items)


def of_directory(path: Path, split: str, subset: str) -> Rows:
    """Read what `save_to_disk` wrote, or the files of a split, as `train.jsonl` or
    `train-00000-of-00002.parquet`, in the directory itself or below `subset`, and there in `data`.
    """
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        found = guarded(f"{path}", lambda: datasets.load_from_disk(str(path)))
        if isinstance(found, datasets.Dataset):
            return Table(path.name, found)
        if split not in found:
            raise ValueError(f"{path} has no split {split}; it has {', '.join(found)}")
        return Table(f"{path.name}/{split}", found[split])
    folders = [path / subset, path, path / subset / "data", path / "data"]
    files = [
        file
        for folder in dict.fromkeys(folders)
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix in SUFFIXES
    ]
    mine = [file for file in files if split_of(file) == split]
    if not mine:
        splits = ", ".join(dict.fromkeys(map(split_of, files))) or "no file that is read"
        raise ValueError(f"{path} has no files of split {split}; it has {splits} (of {READ})")
    same = [of_file(file) for file in mine if file.parent == mine[0].parent]
    return same[0] if len(same) == 1 else Joined(same)


def split_of(file: Path) -> str:
    """`train` of train.jsonl and of train-00000-of-00002.parquet."""
    return re.split(r"[.-]", file.name, maxsplit=1)[0]


def of_hub(name: str, split: str, subset: str) -> Rows:
    """A split of a data set of the Hugging Face hub, or of the library's cache of it."""
    import datasets

    what = f"{name} is no file and no directory here, and from the Hugging Face hub it"
    data = guarded(what, lambda: datasets.load_dataset(name, subset or None, split=split))
    return Table(f"{name}/{split}", data)


def of_parquet(path: Path) -> Rows:
    """A Parquet file, through the cache of `datasets`, which ranks of a machine share."""
    import datasets

    files = {"data_files": str(path), "split": "train"}
    return Table(path.name, guarded(f"{path}", lambda: datasets.load_dataset("parquet", **files)))


def guarded(what: str, call: Callable[[], Any]) -> Any:
    """The result of `datasets`, whose every error is about the data; ValueError where it fails."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return call()
    except Exception as error:  # the library raises anything
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{what} cannot be read by datasets ({type(error).__name__}: {said}); correct the "
            "path, task_args.split or task_args.subset; without a network, name a directory or file"
        ) from error


def begins_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def json_object(line: bytes) -> dict[str, Any]:
    """ValueError where the line is no JSON object."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at column {error.colno}"
        raise ValueError(f"it is no JSON ({wrong})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is {kind_of(value)}, not an object")
    return value


def kind_of(value: Any) -> str:
    """The type of a JSON value in words."""
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")


def listed(wrong: Sequence[str], remedy: str) -> str:
    """The first of many faults of one kind, and how many there are."""
    more = f" (and {len(wrong) - MOST_SHOWN} more)" if len(wrong) > MOST_SHOWN else ""
    return f"{'; '.join(wrong[:MOST_SHOWN])}{more}; {remedy}"
