"""The pages that are looked at: of real runs, made once, and of what was done to copies of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from launching import Run
from shown_runs import made_runs

from tools.report.main import main

Report = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Run]:
    """The runs of shown_runs.py by name."""
    return made_runs(tmp_path_factory)


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> Report:
    """report(*run_dirs): the file of their page, made at the first call."""
    pages: dict[tuple[str, ...], Path] = {}

    def page(*words: Path | str) -> Path:
        asked = tuple(map(str, words))
        if asked not in pages:
            path = tmp_path_factory.mktemp("page") / "report.html"
            assert main([*asked, f"output={path}"]) == 0, asked
            pages[asked] = path
        return pages[asked]

    return page
