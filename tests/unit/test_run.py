"""The run directory, made by a world of one; `test_process.py` makes one with two ranks."""

import json
import os
import re
import shlex
import stat
import sys
import time
from pathlib import Path

import pytest

from mesh.config.schema import Conf
from mesh.lifecycle.files import run_dir_problems
from mesh.lifecycle.process import Process, start
from mesh.runs.directory import create_run_dir, default_run_dir, git_commit


@pytest.fixture
def process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with start(device="cpu", timeout_seconds=30) as process:
        yield process


def test_writes_config_and_environment(process: Process, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-the-user")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = create_run_dir(process, str(tmp_path / "a" / "run"), "tiny", "steps: 3\n")
    assert path == tmp_path / "a" / "run"
    assert sorted(file.name for file in path.iterdir()) == [
        "config.yaml", "environment.json", "lock",
    ]  # fmt: skip
    assert (path / "config.yaml").read_text() == "steps: 3\n"
    text = (path / "environment.json").read_text()
    environment = json.loads(text)
    assert "a-secret-of-the-user" not in text
    assert environment["variables"]["OMP_NUM_THREADS"] == "1"
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["packages"].keys() >= {"torch", "torchtitan", "transformers", "omegaconf"}
    assert (environment["format"], environment["world_size"]) == (1, 1)
    assert [(rank["rank"], bool(rank["device"])) for rank in environment["ranks"]] == [(0, True)]
    assert environment["command"] == shlex.join(sys.orig_argv)
    assert process.guard.run_dir == str(path)


def test_a_later_start_says_which_keys_it_has_changed(process: Process, tmp_path):
    first = "steps: 1000\nlr: 1\nlog:\n  samples: 8\nresume: null\n"
    path = create_run_dir(process, tmp_path / "run", "tiny", first)
    process.lock.release()
    later = f"steps: 10\nlr: 1\nlog:\n  samples: 4\nresume: {path}\nnew: 1\n"
    assert create_run_dir(process, path, "tiny", later, resume=True) == path
    assert (path / "config.yaml").read_text() == first
    names = ("environment.json", "environment-2.json")
    found = [json.loads((path / name).read_text())["changed"] for name in names]
    assert found == [{}, {"steps": "10", "log.samples": "4"}]


def test_follows_the_umask(process: Process, tmp_path):
    old = os.umask(0o027)
    try:
        path = create_run_dir(process, tmp_path / "run", "tiny", "")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert stat.S_IMODE((path / "config.yaml").stat().st_mode) == 0o640


def test_default_name(process: Process, tmp_path, monkeypatch):
    assert re.fullmatch(r"runs/tiny-\d{8}-\d{6}", str(default_run_dir("tiny")))
    monkeypatch.chdir(tmp_path)
    path = create_run_dir(process, None, "tiny", "")
    assert (tmp_path / path / "config.yaml").exists()
    assert path.parts[0] == "runs"


def test_runs_that_start_in_the_same_second_have_names_of_their_own(
    process: Process, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20261126-190429")
    paths = [create_run_dir(process, None, "tiny", "") for _ in range(3)]
    first = "runs/tiny-20261126-190429"
    assert list(map(str, paths)) == [first, f"{first}-2", f"{first}-3"]


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.jsonl"])
def test_refuses_a_directory_that_holds_a_run(process: Process, tmp_path, mark):
    (tmp_path / mark).write_text("kept")
    with pytest.raises(ValueError, match=f"run_dir={tmp_path}.*{mark}.*name another directory"):
        create_run_dir(process, tmp_path, "tiny", "")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(mark, "kept")]


def test_refuses_a_path_below_a_file(process: Process, tmp_path):
    Path(tmp_path, "file").touch()
    with pytest.raises(ValueError, match=r"run_dir=.*/file/run: cannot be made \(Not a directory"):
        create_run_dir(process, tmp_path / "file" / "run", "tiny", "")


def test_git_commit_is_this_repositorys():
    if (Path(__file__).parents[2] / ".git").exists():
        assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", git_commit() or "")


def test_a_new_run_does_not_write_where_links_lead(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl.gz").symlink_to(tmp_path / "not-there-yet")
    (said,) = run_dir_problems(Conf(run_dir=str(tmp_path / "run")))
    assert "holds symbolic links (samples.jsonl.gz), which are not followed" in said
    assert run_dir_problems(Conf(run_dir=str(tmp_path / "new"))) == []
