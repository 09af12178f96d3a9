"""The commands and Python blocks of README.md and docs/, run.

Every command that says nothing else of itself runs here, page by page, as a world of one and with
few steps: `SHORTER` and `IN_PLACE_OF` are all that differs from what is written. Commands that need
several ranks, or of which more than their end is watched, are named in `docs_coverage.py` with the
test that has them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from docs_coverage import LAUNCHERS, to_run
from docs_reading import PAGES, REPOSITORY, Command, blocks

pytestmark = pytest.mark.timeout(900)
FEW = ["steps=2", "num_prompts=4", "group_size=2", "eval.num_prompts=4", "eval.num_samples=1"]
SHORTER = {
    "recipes/grpo.py": FEW,
    "recipes/sft.py": ["sft.steps=2", "sft.batch_size=4", "eval.num_prompts=4"],
    "recipes/evaluate.py": ["eval.num_prompts=4", "eval.num_samples=1"],
}
"""Words that are appended to a program's own; the last word of a key wins."""
IN_PLACE_OF = {
    "resume=RUN_DIR": "resume=RUN_DIR steps=3",  # one step more than the run that it continues
    "step=12": "step=2",
}
SAYS = {
    "recipes/grpo.py": "done  ",
    "recipes/sft.py": "done  ",
    "recipes/evaluate.py": "held-out prompts x 1 samples, model",
    "recipes/generate.py": "> -> ",
    "recipes/replay.py": "equal to the bit: ",
}
"""What a program prints at its end."""


def job_of(
    command: Command, number: int, folder: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """What tests/programs/docs_program.py is to run for a command."""
    launcher = LAUNCHERS.match(command.text)
    assert launcher, f"{command} cannot be run here"
    text = command.text[launcher.end() :]
    for written, instead in IN_PLACE_OF.items():
        text = text.replace(written, instead)
    program, *words = Command(
        command.page, 0, "", text.replace("RUN_DIR", str(folder / "run"))
    ).words
    few = [
        w for w in SHORTER.get(program, []) if not (w.startswith("steps=") and "steps=3" in words)
    ]
    if "--help" in words:
        few = []
    module = launcher[0].endswith("-m ")
    places = [
        str(folder / place) for place in environment.get("PYTHONPATH", "").split(":") if place
    ]
    return {
        "program": program if module else str(REPOSITORY / program),
        "module": module,
        "words": [*words, *few],
        "folder": str(folder),
        "path": places,
        # processes that score start a Python of their own
        "environment": {"PYTHONPATH": os.pathsep.join([*places, str(REPOSITORY)])},
        "output": str(folder / f"output-{number}.txt"),
    }


def jobs_of(folder: Path) -> list[dict[str, Any]]:
    """The jobs of all commands; `export A=B` holds until the end of its page."""
    jobs: list[dict[str, Any]] = []
    environment: dict[str, str] = {}
    page = None
    for command in to_run():
        environment = environment if command.page == page else {}
        page = command.page
        if command.text.startswith("export "):
            name, _, value = command.text.removeprefix("export ").partition("=")
            environment = {**environment, name: value}
        else:
            jobs.append(job_of(command, len(jobs), folder, environment))
    return jobs


def files_of_python_blocks() -> dict[str, str]:
    """The Python blocks by the file that their first line names, `# my_tasks.py`."""
    found = {}
    for block in (block for page in PAGES for block in blocks(page) if block.language == "python"):
        name = re.match(r"# (\w+\.py)\n", block.text)
        assert name, f"{block.page}:{block.line}: a first line like `# my_file.py` is missing"
        found[name[1]] = block.text
    return found


RUN = [command for command in to_run() if not command.text.startswith("export ")]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[tuple[int, str]]:
    """(exit status, output) of every command of `RUN`, in order."""
    folder = tmp_path_factory.mktemp("docs")
    for name, text in files_of_python_blocks().items():
        (folder / name).write_text(text)
    jobs, file = jobs_of(folder), folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/programs/docs_program.py"), str(file)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=True, timeout=600,
    )  # fmt: skip
    statuses = json.loads(file.read_text())
    outputs = [Path(job["output"]).read_text() for job in jobs]
    return list(zip(statuses, outputs, strict=True))


@pytest.mark.parametrize("number", range(len(RUN)), ids=map(str, RUN))
def test_the_command_runs(results, number):
    status, output = results[number]
    assert status == 0, output
    if "--help" not in RUN[number].words:
        program = next((word for word in RUN[number].words if word in SAYS), None)
        assert program is None or SAYS[program] in output, output


def diff_of(page: str) -> str:
    (block,) = (block for block in blocks(Path(page)) if block.language == "diff")
    return block.text


def test_the_family_of_the_page_on_extending_is_that_of_transformers(tmp_path):
    """The patch applies, and a random Seed-OSS has the logprobs of `transformers`."""
    shutil.copytree(REPOSITORY / "mesh", tmp_path / "mesh", ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    patch = ["git", "apply", "-"]
    subprocess.run(patch, cwd=tmp_path, input=diff_of("docs/extending.md"), text=True, check=True)
    program = REPOSITORY / "tests/programs/family_program.py"
    places = [str(tmp_path), str(REPOSITORY / "tests")]
    subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        check=True, timeout=300,
    )  # fmt: skip
