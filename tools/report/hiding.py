"""Leaving out what a page that is shared should not tell: machines, paths and users.

`hosts`: host names of the ranks and of this machine, addresses and URLs. `paths`: the run's
directory, the working directory, the home directory and its user, and every file or directory that
the configuration, the command line or a message names; the last part of model.path stays, as the
model's name. What is known by name is replaced wherever it stands, in rollouts too. What only looks
like a path or an address is replaced where a run speaks of itself, and not in rollouts, where it
may be mathematics.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.report.reading import Run
from tools.report.speed import RATES

HOST, PATH, USER, ADDRESS = "[host]", "[path]", "[user]", "[address]"
ROLLOUTS, MESSAGES, VALUES = 0, 1, 2  # how much is searched for what looks like a path
LEVELS = {
    "config": VALUES,
    "environment": VALUES,
    "facts": VALUES,
    "headline": MESSAGES,
    "findings": MESSAGES,
    "missing": MESSAGES,
    "profiles": MESSAGES,
    "comparison": MESSAGES,
}
OURS = ("help", "default", "key", "label", "promise", "rung", "metric", "try")
KEPT = ("eval/", "-eval/", "reward/", "-reward/", "recipes/")  # metrics and programs, no paths
SHORT = 4  # a name of so many letters is replaced as a whole word only
URL = re.compile(r"\w[\w+.-]*://[^\s'\"]+")
IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])|\[[0-9A-Fa-f:]*:[0-9A-Fa-f:]*\]")
ENDPOINT = re.compile(r"((?:rdzv[-_]endpoint|master[-_]addr)[= ])[^\s:]+", re.IGNORECASE)
QUOTED = re.compile(r"(['\"])(?:~|\.{0,2}/)[^'\"]*\1")
ABSOLUTE = re.compile(r"(?<![\w/.>)\]-])(?:~|\.{1,2})?/[^\s'\",;:=<>()\[\]{}]+")
RELATIVE = re.compile(r"(?<![\w/:.\]-])-?[\w.@+~-]+(?:/[\w.@+~-]+)+/?")
NAMING = ("run_dir", "resume", "model.path", "model.tokenizer", "teacher.path")
ENDINGS = (".path", ".file", ".output", ".results", ".held_out", ".directory")


class Hider:
    """Replaces names in texts. known: by its replacement what is replaced everywhere; bare: names
    of one part, which may be ordinary words, so that they are replaced in values alone."""

    def __init__(self, hide: Sequence[str], known: dict[str, str], bare: Iterable[str]):
        self._hide, self._names = hide, known
        self._known = one_of(known)
        self._bare = one_of(bare, whole=True)
        self._users = one_of(users(), whole=True) if "paths" in hide else None

    def text(self, text: str, level: int) -> str:
        """A text without names."""
        if self._known is not None:
            text = self._known.sub(lambda found: self._names[found[0]], text)
        if level >= MESSAGES and "hosts" in self._hide:
            text = ENDPOINT.sub(rf"\1{HOST}", IP.sub(ADDRESS, URL.sub(ADDRESS, text)))
        if level >= MESSAGES and "paths" in self._hide:
            text = ABSOLUTE.sub(PATH, QUOTED.sub(PATH, URL.sub(ADDRESS, text)))
            text = self._users.sub(USER, text) if self._users else text
        if level >= VALUES and "paths" in self._hide:
            text = RELATIVE.sub(lambda found: found[0] if kept(found[0]) else PATH, text)
            text = self._bare.sub(PATH, text) if self._bare else text
        return text

    def walk(self, value: Any, level: int) -> Any:
        """A value of the page's data with all its texts replaced."""
        if isinstance(value, str):
            return self.text(value, level)
        if isinstance(value, list):
            return [self.walk(item, level) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            self.text(key, ROLLOUTS): self.walk(
                item, ROLLOUTS if key in OURS else LEVELS.get(key, level)
            )
            for key, item in value.items()
        }


def one_of(names: Iterable[str], whole: bool = False) -> re.Pattern[str] | None:
    """A pattern of any of these names, the longest first; short ones and, with `whole`, all as
    whole words."""
    listed = sorted({name for name in names if name}, key=len, reverse=True)
    words = [
        rf"(?<!\w){re.escape(name)}(?!\w)" if whole or len(name) <= SHORT else re.escape(name)
        for name in listed
    ]
    return re.compile("|".join(words)) if words else None


def kept(word: str) -> bool:
    """True for a word with a slash that is no path: a metric, a program of ours, a rate's unit, a
    fraction."""
    return (
        word.startswith(KEPT) or word in RATES or re.fullmatch(r"-?\d+(?:/\d+)+", word) is not None
    )


def hidden(data: dict[str, Any], runs: Sequence[Run], hide: Sequence[str]) -> dict[str, Any]:
    """The data of a page without what `hide` names; with paths, runs are numbered."""
    if not hide:
        return data
    known: dict[str, str] = {}
    bare: set[str] = set()
    if "paths" in hide:
        named = {name for run in runs for name in paths(run)}
        bare = {name for name in named if "/" not in name}
        known |= dict.fromkeys(named - bare, PATH)
        for place, run in enumerate(data["runs"], 1):
            run["name"] = run["headline"]["title"] = f"run {place}"
    if "hosts" in hide:
        known |= dict.fromkeys(hosts(runs), HOST)
    hider = Hider(hide, known, bare)
    return data | {
        "runs": [hider.walk(run, ROLLOUTS) for run in data["runs"]],
        "comparison": compared(hider, data["comparison"]),
    }


def compared(hider: Hider, comparison: dict[str, Any] | None) -> dict[str, Any] | None:
    """The comparison, whose text names runs by their directories."""
    return None if comparison is None else hider.walk(comparison, MESSAGES)


def hosts(runs: Sequence[Run]) -> Iterator[str]:
    """Host names, with and without their domains."""
    found = {socket.gethostname()}
    for run in runs:
        for environment in run.environments:
            ranks = environment.get("ranks")
            for rank in ranks if isinstance(ranks, list) else []:
                if isinstance(rank, dict) and isinstance(rank.get("host"), str):
                    found.add(rank["host"])
    for name in found - {"localhost"}:
        yield from {name, name.partition(".")[0]} - {""}


def paths(run: Run) -> Iterator[str]:
    """The paths that are known: of the run, of this process, and of keys that name one."""
    for path in (run.path, run.path.absolute(), run.path.resolve(), Path.cwd(), Path.home()):
        yield from spellings(str(path))
    for name, value in run.settings.items():
        if is_path(name, value):
            yield from spellings(value)


def is_path(name: str, value: Any) -> bool:
    """True for a key that names a file or a directory of the user's."""
    named = name in NAMING or name.endswith(ENDINGS)
    return named and isinstance(value, str) and not value.startswith("package:") and value != "null"


def spellings(path: str) -> Iterator[str]:
    """A path as it may be written; none for `.` and `/`."""
    if path.strip("/.~"):
        full = Path(path).expanduser()
        yield from {path, path.rstrip("/"), str(full), str(full.absolute())}


def users() -> Iterator[str]:
    """The user whose home it is; `root` says nothing about anybody."""
    if (name := Path.home().name) not in ("", "root"):
        yield name
