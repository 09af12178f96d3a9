"""The text of `--help`: the configs, and every key with its default, meaning and range."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

from mesh.config.evaluation_sets import documented_keys
from mesh.config.keys import ConfKey, alternatives, range_text, shown
from mesh.config.schema import CONF_DIR


def print_help_and_exit() -> NoReturn:
    """Print the configs and the keys, on the first of a launcher's processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(help_text(), flush=True)
    raise SystemExit(0)


def help_text() -> str:
    """Every config with its first comment line, every key with default, meaning and range."""
    lines = ["usage: RECIPE conf=NAME [key=value ...]", "", "configs (or a path to a .yaml):"]
    lines += config_lines()
    lines += ["", "keys, with their defaults (a config may set others):"]
    lines += [
        f"  {f'{key.name}={shown(key.default)}':<44} {meaning(key)}" for key in documented_keys()
    ]
    return "\n".join(lines)


def missing_config_text() -> str:
    """The message for a command line that names no config."""
    first = "conf=NAME is needed; NAME is a path to a .yaml, or one of"
    return "\n".join([first, *config_lines(), "--help lists all keys"])


def config_lines() -> list[str]:
    """Every config of `conf/` with its first comment line."""
    paths = sorted(CONF_DIR.glob("*.yaml"))
    return [f"  {path.stem:<20} {first_comment(path)}" for path in paths]


def first_comment(path: Path) -> str:
    """The first line of a file that is a comment, without its mark."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return comments[0].lstrip("# ") if comments else ""


def meaning(key: ConfKey) -> str:
    """A key's one line: what it is, then its choices or its range."""
    kind, _ = alternatives(key.annotation)
    if get_origin(kind) is Literal:
        return f"{key.meaning} ({'|'.join(get_args(kind))})"
    return f"{key.meaning} ({range_text(key.bounds)})" if key.bounds else key.meaning
