"""Recipes one after another in the same ranks: `torchrun recipes_program.py JOBS`.

The start of a rank costs seconds of imports, so that runs on equally many ranks share it. JOBS is a
JSON file: [recipe, words, directory] of each run. A run has its directory as the working directory;
`output.txt` there gets what rank 0 prints to stdout, `status.txt` the status with which it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest import mock


def main(jobs: list[tuple[str, list[str], str]]) -> None:
    suffix = "" if os.environ.get("RANK", "0") == "0" else f"-{os.environ['RANK']}"
    for attempt, (recipe, words, directory) in enumerate(jobs):
        # as if torchrun had started it again: the store of the launch has keys for each attempt
        own_keys = mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=str(attempt))
        with own_keys, chdir(directory), open(f"output{suffix}.txt", "w") as output:
            with redirect_stdout(output):
                status = status_of(recipe, words)
            Path(f"status{suffix}.txt").write_text(str(status))


def status_of(recipe: str, words: list[str]) -> int:
    try:
        importlib.import_module(f"mesh.recipes.{recipe}").main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
