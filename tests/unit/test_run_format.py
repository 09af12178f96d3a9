"""Run directories of another format: refused on resume and replay, before anything else is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh.config.loading import load_conf, save_conf
from mesh.config.run_format import RUN_FORMAT
from mesh.config.schema import Conf
from mesh.recipes.replay import main as replay_main


def made(path: Path, *formats: object) -> Path:
    """A run directory with one environment file for each format; "none": without the entry."""
    path.mkdir()
    save_conf(Conf(steps=7), path / "config.yaml")
    for start, version in enumerate(formats, 1):
        name = "environment.json" if start == 1 else f"environment-{start}.json"
        entry = {} if version == "none" else {"format": version}
        (path / name).write_text(json.dumps(entry | {"world_size": 1}))
    return path


@pytest.mark.parametrize("formats", [(RUN_FORMAT,), ("none",), (RUN_FORMAT, RUN_FORMAT), ()])
def test_a_run_of_this_format_or_older_than_the_entry_is_resumed(tmp_path, formats):
    path = made(tmp_path / "run", *formats)
    assert load_conf([f"resume={path}"], resumes=True)[1].steps == 7


def test_a_truncated_environment_does_not_prevent_a_resume(tmp_path):
    path = made(tmp_path / "run", RUN_FORMAT)
    (path / "environment-2.json").write_text('{"format": 9, "sta')
    assert load_conf([f"resume={path}"], resumes=True)[1].steps == 7


@pytest.mark.parametrize("formats", [(2,), (RUN_FORMAT, 2), (0,), ("two",), ([2],)])
def test_a_run_of_another_format_is_refused_with_both_versions(tmp_path, formats):
    path = made(tmp_path / "run", *formats)
    with pytest.raises(ValueError) as caught:
        load_conf([f"resume={path}"], resumes=True)
    assert str(caught.value).splitlines() == [
        "1 problem with the configuration:",
        f"- resume={path}: has run format {formats[-1]}, this version of mesh reads {RUN_FORMAT}; "
        "use the version that wrote it, or start a new run",
    ]


def test_a_replay_refuses_another_format_before_it_reads_the_configuration(tmp_path, capsys):
    path = made(tmp_path / "run", 2)
    (path / "config.yaml").write_text("a key of another version: 1\n")
    with pytest.raises(SystemExit) as caught:
        replay_main([str(path), "step=1"])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "has run format 2" in said and "key of another version" not in said
