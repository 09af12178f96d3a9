"""The wheel that `pip install .` builds: what is in it, and that it trains where no checkout is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from launching import REPOSITORY, TORCHRUN

FOLDERS = {"mesh": "mesh", "recipes": "mesh/recipes", "conf": "mesh/conf"}
"""Where each folder of the checkout lies in the wheel."""
IMPORT_ALL = """
import importlib, sys
from mesh.config.schema import CONF_DIR
for name in sys.argv[1:]:
    importlib.import_module(f"mesh.recipes.{name}")
ours = (module for name, module in sys.modules.items() if name.partition(".")[0] == "mesh")
print(CONF_DIR, *filter(None, (module.__file__ for module in ours)))
"""
OWN_TASK = """
from dataclasses import dataclass

from mesh.tasks.spell_backward import SpellBackward


@dataclass(frozen=True)
class Mine(SpellBackward):
    pass
"""


def python(target: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python that has the installed wheel alone in front of its packages; it must succeed."""
    paths = {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words],
        cwd=cwd, env=os.environ | paths, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def files_in(folder: Path, *suffixes: str) -> set[str]:
    found = (path for path in folder.rglob("*") if path.suffix in suffixes)
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """The directory into which the wheel was installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    nothing_built = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=nothing_built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    offline = ("-m", "pip", "--no-input", "--disable-pip-version-check")
    alone = ("--no-index", "--no-deps")
    build = ("wheel", *alone, "--no-build-isolation", "--wheel-dir", str(source / "built"))
    python(source, source, *offline, *build, str(source))
    (wheel,) = (source / "built").glob("mesh-*.whl")
    python(source, source, *offline, "install", *alone, "--target", str(target), str(wheel))
    return target


def test_the_wheel_holds_what_the_checkout_holds(target: Path):
    kinds = (".py", ".yaml", ".json", ".safetensors")
    there = {
        f"{place}/{name}"
        for folder, place in FOLDERS.items()
        for name in files_in(REPOSITORY / folder, *kinds)
    }
    assert {f"mesh/{name}" for name in files_in(target / "mesh", *kinds)} == there


def test_a_vllm_finds_the_model_that_it_serves(target: Path):
    (installed,) = metadata.distributions(name="mesh", path=[str(target)])
    found = [(point.group, point.value) for point in installed.entry_points]
    assert found == [("vllm.general_plugins", "mesh.engine.vllm.plugin:register")]


def test_every_recipe_is_imported_from_the_wheel(target: Path, tmp_path: Path):
    names = [path.stem for path in (REPOSITORY / "recipes").glob("*.py")]
    output = python(target, tmp_path, "-c", IMPORT_ALL, *names).stdout
    assert len(output.split()) > 80
    assert [path for path in output.split() if not path.startswith(str(target / "mesh"))] == []


def test_two_ranks_train_from_any_directory(target: Path, tmp_path: Path):
    """With a task of the user's own in that directory, which processes of their own score."""
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    words = ["conf=qwen3_tiny", "task=own_task:Mine", "steps=2", "num_prompts=4", "group_size=2"]
    words += ["eval.num_prompts=4", "eval.num_samples=1", "log.tensorboard=false", "run_dir=run"]
    launcher = [*TORCHRUN[1:], "--nproc-per-node=2", "-m", "mesh.recipes.grpo"]
    python(target, tmp_path, *launcher, *words)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["logprob_diff/max"] < 1e-4 and len(lines[2]["digest/weights"]) == 16
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    (version,) = {found.version for found in metadata.distributions(name="mesh", path=[target])}
    assert environment["git"] is None and environment["packages"]["mesh"] == version
    assert "-m mesh.recipes.grpo conf=qwen3_tiny" in environment["command"]
