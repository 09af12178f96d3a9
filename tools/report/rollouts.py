"""The index of a file of rollouts: where each group stands, without reading its texts.

A file may have hundreds of megabytes, of which a page shows a few. The index is kept while the
process lives, and of a file that grows only the new end is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from mesh.runs.samples import without_nulls
from tools.report.lines import Block, Damage, Line, blocks, parsed
from tools.report.thinning import number

HEAD = re.compile(
    rb'\{"step": ?(\d+), ?"split": ?"(\w+)", ?"set": ?"([^"\\]*)", ?"chosen": ?"(\w+)", ?'
    rb'"prompt_id": ?(-?\d+)'
)
REWARD = re.compile(rb'(?<!\\)"reward": ?(-?[0-9.eE+-]+)')
CHOSEN = ("best", "worst", "random", "fixed")
VERSIONS = count()
EDGE = 64  # bytes before the end of what was read, by which a file is known again


@dataclass
class Group:
    """The rollouts of one prompt of one step. place: of its block; lines: within it; rewards: where
    nothing says why the group was kept."""

    step: int
    split: str
    set: str
    prompt: int
    chosen: str
    place: int
    lines: list[int] = field(default_factory=list)
    size: int = 0
    rewards: list[float] = field(default_factory=list)

    @property
    def name(self) -> tuple[int, str, str, int, int]:
        return self.step, self.split, self.set, self.prompt, self.place

    @property
    def mean(self) -> float:
        return sum(self.rewards) / max(len(self.rewards), 1)


@dataclass
class Index:
    """The groups of a file, as far as it was read. version: another one for each new file."""

    groups: list[Group] = field(default_factory=list)
    rows: int = 0
    end: int = 0
    edge: bytes = b""
    damage: Damage = field(default_factory=lambda: Damage("samples"))
    version: int = field(default_factory=lambda: next(VERSIONS))


_known: dict[Path, Index] = {}


def index_of(path: Path) -> Index:
    """The index of a file of rollouts; what of it was read before is not read again."""
    index = _known.get(path)
    if index is None or not same_file(path, index):
        index = _known[path] = Index(damage=Damage(path.name))
    index.damage.truncated = False
    for block in blocks(path, index.damage, index.end):
        add(index, block)
        index.end = block.end
    index.edge = edge_of(path, index.end)
    return index


def same_file(path: Path, index: Index) -> bool:
    """True if the file still has what the index was made of."""
    return path.stat().st_size >= index.end and edge_of(path, index.end) == index.edge


def edge_of(path: Path, end: int) -> bytes:
    """The last bytes before a place in a file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(end - EDGE, 0))
            return file.read(min(EDGE, end))
    except OSError:
        return b""


def add(index: Index, block: Block) -> None:
    """Add the rows of a block."""
    group = None
    for position, line in enumerate(block.lines):
        if not line.strip():
            continue
        found = group_of(line, block.offset)
        if found is None:
            index.damage.lines += 1
            continue
        if group is None or found.name != group.name:
            group = found
            index.groups.append(group)
        group.lines.append(position)
        group.size += len(line)
        index.rows += 1
        if group.chosen not in CHOSEN:
            match = REWARD.search(line)
            group.rewards.append(number_of(match[1]) if match else 0.0)


def number_of(text: bytes) -> float:
    """A reward; 0 for what is no number."""
    try:
        return number(float(text)) or 0.0
    except ValueError:
        return 0.0


def group_of(line: bytes, place: int) -> Group | None:
    """The group that a row belongs to; None: the line is no row."""
    if (head := HEAD.match(line)) and line.rstrip().endswith(b"}"):
        step, split, name, chosen, prompt = head.groups()
        texts = (split.decode(), name.decode(errors="replace"))
        return Group(int(step), *texts, int(prompt), chosen.decode(), place)
    row = parsed(line)
    if row is None or not isinstance(row.get("prompt_id", 0), int):
        return None
    names = (str(row.get("split", "train")), str(row.get("set", "")))
    return Group(row["step"], *names, row.get("prompt_id", 0), str(row.get("chosen", "")), place)


class Reader:
    """Reads groups of a file; of neighbours in one block the block is read once."""

    def __init__(self, path: Path):
        self._path = path
        self._place = -1
        self._lines: list[bytes] = []

    def rows(self, group: Group) -> list[Line]:
        """The rows of a group; lines that are no JSON are left out."""
        if group.place != self._place:
            block = next(blocks(self._path, Damage(self._path.name), group.place), None)
            self._place, self._lines = group.place, block.lines if block else []
        here = [self._lines[i] for i in group.lines if i < len(self._lines)]
        found = (parsed(line) for line in here)
        return [without_nulls(row) for row in found if row is not None]
