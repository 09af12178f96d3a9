"""Options of the report, from a command line of directories and key=value words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.config.keys import problem
from mesh.config.spelling import meant

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
    no directory is named, or with all that is wrong."""
    run_dirs, given, wrong = read_words(argv, KEYS, usage)
    if wrong := wrong + hide_problems(given.get("hide", "")):
        raise ValueError("\n".join(wrong))
    return run_dirs, Options(
        hide=hidden(given.get("hide", "")),
        title=given.get("title", ""),
        output=file_named(given.get("output", "")),
        picture=file_named(given.get("picture", "")),
    )


def read_words(
    argv: Sequence[str], keys: Collection[str], usage: str
) -> tuple[list[Path], dict[str, str], list[str]]:
    """The run directories of a command line, the values of its keys, and what is wrong with other
    words. Raises ValueError with `usage` where that is asked for, or no directory is named."""
    run_dirs, given, wrong = [], {}, []
    for word in argv:
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            raise ValueError(usage)
        if equals and name in keys:
            given[name] = value
        elif equals and name.isidentifier() and not Path(word).exists():
            remedy = f"{meant(name, keys)}the keys are {', '.join(keys)}"
            wrong.append(problem(name, value, "unknown key", remedy))
        else:
            run_dirs.append(Path(word).expanduser())
    if not run_dirs and not wrong:
        raise ValueError(usage)
    return run_dirs, given, wrong


def file_named(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def hidden(text: str) -> tuple[str, ...]:
    """The parts of `hide=`."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def hide_problems(text: str) -> list[str]:
    """One text for each part of `hide=` that is none of HIDEABLE."""
    remedy = f"use {' or '.join(HIDEABLE)}"
    return [
        problem("hide", text, f"{name} cannot be hidden", remedy)
        for name in hidden(text)
        if name not in HIDEABLE
    ]
