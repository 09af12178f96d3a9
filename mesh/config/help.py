"""What `--help` prints: the configs, and every key with its default, meaning and range."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

from mesh.config.keys import Key, alternatives, conf_keys, range_text, shown
from mesh.config.schema import CONF_DIR


def print_help_and_exit(missing: bool) -> NoReturn:
    """Prints the configs and the keys, on the first of a launcher's processes only."""
    if missing:
        print("conf=NAME is needed: say which of the configs below to run", flush=True)
    if os.environ.get("RANK", "0") == "0":
        print(help_text(), flush=True)
    raise SystemExit(2 if missing else 0)


def help_text() -> str:
    """Every config with its first comment line, every key with default, meaning and range."""
    configs = [(path, first_comment(path)) for path in sorted(CONF_DIR.glob("*.yaml"))]
    lines = ["usage: RECIPE conf=NAME [key=value ...]", "", "configs (or a path to a .yaml):"]
    lines += [f"  {path.stem:<20} {comment}" for path, comment in configs]
    lines += ["", "keys, with their defaults (a config may set others):"]
    lines += [
        f"  {f'{key.name}={shown(key.default)}':<44} {meaning(key)}" for key in conf_keys().values()
    ]
    return "\n".join(lines)


def first_comment(path: Path) -> str:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return comments[0].lstrip("# ") if comments else ""


def meaning(key: Key) -> str:
    """A key's one line: what it is, then its choices or its range."""
    kind, _ = alternatives(key.annotation)
    if get_origin(kind) is Literal:
        return f"{key.meaning} ({'|'.join(get_args(kind))})"
    return f"{key.meaning} ({range_text(key.bounds)})" if key.bounds else key.meaning
