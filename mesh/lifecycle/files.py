"""Directories that a run may write to (its own alone, no symbolic links), and durable writes."""

from __future__ import annotations

import os
from pathlib import Path

from mesh.config.keys import problem
from mesh.config.schema import Conf, resolve_path

MARKS = ("config.yaml", "metrics.jsonl")
"""Files that mark a directory as holding a run."""


def run_dir_problems(conf: Conf) -> list[str]:
    """A run directory that is a file, holds symbolic links, or already holds another run."""
    if conf.run_dir is None:
        return []
    path = resolve_path(conf.run_dir)
    if conf.resume is not None:
        return link_problems("resume", conf.resume, path)
    if path.exists() and not path.is_dir():
        return [problem("run_dir", conf.run_dir, "is a file", "name a directory")]
    if holds := [name for name in MARKS if (path / name).exists()]:
        wrong = f"already holds a run ({', '.join(holds)})"
        remedy = "name another directory, or move that run away"
        return [problem("run_dir", conf.run_dir, wrong, remedy)]
    return link_problems("run_dir", conf.run_dir, path)


def link_problems(key: str, name: str, path: Path) -> list[str]:
    """Symbolic links in a run's directory, through which it would write elsewhere."""
    links = (
        sorted(item.name for item in path.iterdir() if item.is_symlink()) if path.exists() else []
    )
    wrong = f"holds symbolic links ({', '.join(links)}), which are not followed"
    return [problem(key, name, wrong, "replace them by the files themselves")] if links else []


def sync_path(path: Path) -> None:
    """Flush a directory's names, or a file's bytes, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush a directory, and all that is in it, to the disk."""
    for item in (*path.rglob("*"), path):
        sync_path(item)
