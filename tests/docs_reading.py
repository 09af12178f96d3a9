"""What README.md, CONTRIBUTING.md and docs/ say: their code blocks, commands, links and tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# in this order the commands run: the first page makes RUN_DIR, which later ones use
PAGES = [
    Path("docs/checkpoints.md"),
    Path("README.md"),
    Path("CONTRIBUTING.md"),
    *sorted(
        path.relative_to(REPOSITORY)
        for path in (REPOSITORY / "docs").glob("*.md")
        if path.name != "checkpoints.md"
    ),
]
NEEDS = ("gpu", "machines", "install", "slow")
"""What a block may say that it needs: ```bash gpu and so on. `machines`: several of them, or a
cluster; `slow`: a benchmark of many minutes. All others run, or have a test that covers them."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, and the rest of the line that opens it."""

    page: Path
    line: int
    language: str
    needs: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a shell block, its continuation lines joined, without comments."""

    page: Path
    line: int
    needs: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def read(page: Path) -> str:
    return (REPOSITORY / page).read_text()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.finditer(r"^```(\w*) ?(.*)\n((?:.*\n)*?)```$", read(page), re.M)
    return [
        Block(page, read(page)[: match.start()].count("\n") + 1, match[1], match[2], match[3])
        for match in found
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", read(page), flags=re.M)


def commands(page: Path) -> list[Command]:
    """The commands of a page's shell blocks, in order."""
    return [
        Command(page, block.line + offset, block.needs, text)
        for block in blocks(page)
        if block.language == "bash"
        for offset, text in _commands_of(block.text)
    ]


def _commands_of(text: str) -> Iterator[tuple[int, str]]:
    """(line in the block, command); a command ends with its line unless a backslash or an open
    quote carries it on."""
    held, begun = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        begun, held = (begun, f"{held} {line}") if held else (number, line)
        if held.endswith("\\") and not held.count("'") % 2:
            held = held.removesuffix("\\").rstrip()
            continue
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # an open quote
            continue
        if words:
            yield begun, " ".join(re.sub(r"(^|\s)#.*", "", held).split())
        held = ""


def tables(page: Path) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the header first."""
    found = re.findall(r"(?:^\|.*\|\n)+", read(page), re.M)
    rows = [[_cells(line) for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in rows]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def code_spans(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*\n(?:.*\n)*?```$", "", read(page), flags=re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
