"""What hide= leaves out, and secrets, which are never shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import ENVIRONMENT, make_run, member

from tools.report.build import report_data
from tools.report.html import page
from tools.report.main import main
from tools.report.options import Options

HOST, MODEL = "frosty-4821.cluster.example", "/data/secret-team/models/qwen-own"
FILE = "sets/private/sums.jsonl"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run that names its places everywhere."""
    home = tmp_path / "homes" / "quentin"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("socket.gethostname", lambda: "laptop-of-quentin")
    path = tmp_path / "place" / "my-run"
    words = (f"model.path={MODEL}", f"run_dir={path}", "task=dataset", f"task_args.path={FILE}",
             f"teacher.path={home}/teacher",
             "prompt.system=see /etc/some-file or ~/notes")  # fmt: skip
    make_run(path, steps=3, tokens=4, prompts=1, words=words)
    command = (
        f"{home}/venv/bin/python {Path.cwd()}/recipes/grpo.py model.path={MODEL} run_dir={path} "
        f"--rdzv-endpoint={HOST}:29500 --master-addr=10.1.2.3 task_args.api_key=sesame "
        f"'prompt.file=/a b/c' log.url=https://{HOST}/x task_args.path={FILE}"
    )
    ranks = [{"rank": 0, "host": HOST, "device": "a CPU"}, {"rank": 1, "host": "vm", "device": "x"}]
    environment = ENVIRONMENT | {"command": command, "ranks": ranks}
    (path / "environment.json").write_text(json.dumps(environment))
    (path / "profiles").mkdir()
    (path / "profiles" / "step-3-rank-0.txt").write_text(f"{home}/code.py(12) on {HOST}")
    row = {"step": 2, "split": "train", "set": "", "chosen": "best", "prompt_id": 7,
           "prompt": f"What is 1/2 of {path}?",
           "response": f"</think> and/or 3/4 on {HOST}, vm"}  # fmt: skip
    with open(path / "samples.jsonl.gz", "ab") as file:
        file.write(member([row]))
    return path


def names(run_dir):
    """Texts that must not be in a page, by what hides them."""
    home = Path.home()
    paths = (str(run_dir), str(run_dir.parent), str(home), "quentin", MODEL, "secret-team",
             str(Path.cwd()), FILE, "private", "/etc/some-file", "~/notes", "/a b/c",
             "my-run")  # fmt: skip
    return {"hosts": (HOST, "frosty-4821", "10.1.2.3", "laptop-of-quentin"), "paths": paths}


def test_without_hide_they_are_shown(run_dir):
    text = page(report_data([run_dir]))
    for name in (str(run_dir), MODEL, HOST, "10.1.2.3", FILE, "/etc/some-file"):
        assert name in text, name


def test_hide_leaves_them_out_of_the_whole_file(run_dir, tmp_path):
    output = tmp_path / "shared.html"
    assert main([str(run_dir), f"output={output}", "hide=hosts,paths"]) == 0
    text = output.read_text()
    for name in [*names(run_dir)["hosts"], *names(run_dir)["paths"]]:
        assert name not in text, name
    data = report_data([run_dir], Options(hide=("hosts", "paths")))["runs"][0]
    assert data["name"] == data["headline"]["title"] == "run 1"
    (row,) = [row for row in data["samples"]["rows"] if row["prompt_id"] == 7]
    assert row["prompt"] == "What is 1/2 of [path]?"
    assert row["response"] == "</think> and/or 3/4 on [host], [host]"
    assert "qwen-own" in data["headline"]["sentence"], "the model has a name"
    table = {entry["key"]: entry["value"] for entry in data["config"]}
    assert table["prompt.system"] == "see [path] or [path]"
    assert table["task_args.path"] == table["model.path"] == table["run_dir"] == "[path]"
    assert table["checkpoint.best_metric"] == "eval/accuracy"
    assert table["trainer.lr"] == "1.0e-06"


@pytest.mark.parametrize(("hide", "other"), [("hosts", "paths"), ("paths", "hosts")])
def test_each_part_hides_its_own(run_dir, hide, other):
    text = page(report_data([run_dir], Options(hide=(hide,))))
    shown = {name for name in names(run_dir)[other] if name in text}
    assert not [n for n in names(run_dir)[hide] if n in text and n not in names(run_dir)[other]]
    assert len(shown) >= 2


def test_a_comparison_hides_them_too(run_dir, tmp_path):
    other = make_run(tmp_path / "place" / "other-run", steps=3, prompts=0)
    text = page(report_data([run_dir, other], Options(hide=("hosts", "paths"))))
    for name in (*names(run_dir)["hosts"], *names(run_dir)["paths"], "other-run"):
        assert name not in text, name


def test_relative_directories_of_one_name_are_left_out_of_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), steps=3, prompts=0, words=("run_dir=run", "model.path=step"))
    data = report_data([Path("run")], Options(hide=("paths",)))["runs"][0]
    table = {entry["key"]: entry["value"] for entry in data["config"]}
    assert table["run_dir"] == table["model.path"] == "[path]"
    assert data["headline"]["sentence"].endswith("3 steps.")
    assert str(tmp_path) not in page({"runs": [data]})


def test_units_of_rates_are_no_paths(run_dir):
    data = report_data([run_dir], Options(hide=("hosts", "paths")))["runs"][0]
    values = [fact["value"] for fact in data["speed"]["facts"]]
    assert any(value.endswith(" tokens/s") for value in values), values
    assert not any("[path]" in value for value in values), values


@pytest.mark.parametrize("hide", [(), ("hosts", "paths")])
def test_secrets_are_never_shown(run_dir, hide):
    with open(run_dir / "config.yaml", "a") as file:
        file.write("task_args:\n  api_key: sesame\n  deep: {password: sesame, kind: open}\n")
    environment = json.loads((run_dir / "environment.json").read_text())
    environment |= {"AWS_SECRET": "sesame", "nested": {"token": "sesame"}}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    data = report_data([run_dir], Options(hide=hide))
    text = page(data)
    assert "sesame" not in text and "api_key=(not shown)" in text
    assert "kind: open" in text
