"""Options of the report, from a command line of directories and key=value words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEYS = ("output", "title", "hide", "picture")
HIDEABLE = ("hosts", "paths")


@dataclass(frozen=True)
class Options:
    """`hide`: some of HIDEABLE; `title`: "" for the first run's name; `output`, `picture`: None
    for the default file and for no picture."""

    hide: tuple[str, ...] = ()
    title: str = ""
    output: Path | None = None
    picture: Path | None = None


def read_options(argv: Sequence[str], usage: str) -> tuple[list[Path], Options]:
    """The run directories and the options of a command line. Raises ValueError with `usage` where
    no directory is named, or with what is wrong."""
    given = {}
    run_dirs = []
    for word in argv:
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            raise ValueError(usage)
        if equals and name in KEYS:
            given[name] = value
        elif equals and not Path(word).exists() and name.isidentifier():
            raise ValueError(f"{word}: unknown key; the keys are {', '.join(KEYS)}")
        else:
            run_dirs.append(Path(word))
    if not run_dirs:
        raise ValueError(usage)
    return run_dirs, Options(
        hide=hidden(given.get("hide", "")),
        title=given.get("title", ""),
        output=Path(given["output"]) if given.get("output") else None,
        picture=Path(given["picture"]) if given.get("picture") else None,
    )


def hidden(text: str) -> tuple[str, ...]:
    """The parts of `hide=`. Raises ValueError for a name that is none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in HIDEABLE:
            raise ValueError(f"hide={text}: {name} is not {' or '.join(HIDEABLE)}")
    return names
