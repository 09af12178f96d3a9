"""Starting the real recipes as a user does, and reading what a run wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mesh.runs.samples import read_samples

REPOSITORY = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
WITH_A_RUN_DIR = ("grpo", "sft")
OF_A_LAUNCH = {f"{name}{rank}.txt" for name in ("output", "status") for rank in ("", "-1")}
"""What `runs` leaves in the working directory of a run on one or two ranks."""
TWO_RANK_LAYOUTS = {
    "trainer tp 2": ["mesh.mode=colocated", "trainer.tp=2", "trainer.dp_shard=1", "generator.tp=1"],
    "generator tp 2": ["mesh.mode=colocated", "trainer.dp_shard=2", "generator.tp=2"],
    "split": ["mesh.mode=split"],
}
"""Layouts of two ranks in which trainer and generator differ."""


def launch(
    program: str,
    num_ranks: int,
    *words: str,
    status: int = 0,
    path: Path | None = None,
    seconds: float = 240,
    **options,
) -> subprocess.CompletedProcess[str]:
    """Run `program` (relative to the repository) on `num_ranks`; one rank needs no torchrun.

    `status` 0: it must succeed, else it must not. `path` goes in front of PYTHONPATH. `seconds`:
    the longest that it may take.
    """
    launcher = [*TORCHRUN, f"--nproc-per-node={num_ranks}"] if num_ranks > 1 else [sys.executable]
    given = os.environ.get("PYTHONPATH")
    places = [str(place) for place in (path, REPOSITORY, REPOSITORY / "tests", given) if place]
    result = subprocess.run(
        [*launcher, str(REPOSITORY / program), *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        **options,
    )
    assert (result.returncode == 0) == (status == 0), result.stdout + result.stderr
    return result


class Run:
    """A run's directory, read."""

    def __init__(self, path: Path, output: str) -> None:
        self.path = path
        self.output = output

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return _lines(self.path / "metrics.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Of the training steps."""
        return [row for row in self.kept if row["split"] == "train"]

    @cached_property
    def kept(self) -> list[dict[str, Any]]:
        """Those of evaluations too."""
        return read_samples(self.path)

    def answers(self, step: int) -> dict[tuple[int, int], tuple[str, float]]:
        """(response, reward) by (prompt_id, sample_id) of what was written down of a step."""
        return {
            (s["prompt_id"], s["sample_id"]): (s["response"], s["reward"])
            for s in self.samples
            if s["step"] == step
        }


def run(recipe: str, path: Path, num_ranks: int, *words: str) -> Run:
    """Launch a recipe with `path` as its run directory."""
    return Run(path, launch(recipe, num_ranks, *words, f"run_dir={path}").stdout)


def runs(
    root: Path,
    num_ranks: int,
    asked: Mapping[str, tuple[str, Sequence[str]]],
    statuses: Mapping[str, int] | None = None,
    path: Path | None = None,
) -> dict[str, Run]:
    """Launch recipes one after another in the same ranks: what each wrote, by name.

    `asked`: recipe (`grpo`) and words by name; `statuses`: the status of those that do not end with
    0; `path`: as for `launch`. The working directory is `root/NAME`, and the run directory of a new
    run `root/NAME/run`.
    """
    jobs = []
    for name, (recipe, words) in asked.items():
        directory = root / name
        directory.mkdir()
        jobs.append([recipe, [*words, *_own_run_dir(recipe, words, directory)], str(directory)])
    file = root / f"jobs-{num_ranks}.json"
    file.write_text(json.dumps(jobs))
    program = "tests/programs/recipes_program.py"
    output = launch(program, num_ranks, str(file), path=path, seconds=600)
    ended = {name: int((root / name / "status.txt").read_text()) for name in asked}
    assert ended == dict.fromkeys(asked, 0) | dict(statuses or {}), output.stderr
    return {
        name: Run(root / name / "run", (root / name / "output.txt").read_text()) for name in asked
    }


def _own_run_dir(recipe: str, words: Sequence[str], directory: Path) -> list[str]:
    makes_one = recipe in WITH_A_RUN_DIR and not any(word.startswith("resume=") for word in words)
    return [f"run_dir={directory / 'run'}"] if makes_one else []


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
