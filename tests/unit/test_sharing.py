"""A report tells nobody's secrets, whatever is in the run's files; with `hide` it names no machine,
no path and no user either, and still says what the run did. Three seconds."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from report_runs import ENVIRONMENT, make_run, row

from tools.report.main import main

NAMED = [f"canary-{i}-of-a-secret" for i in range(9)]
HEX = "0123456789abcdef" * 2 + "fedcba98"
SHAPED = ["hf_" + "aB3" * 12, "sk-" + "aB3-_" * 8, "ghp_" + "aB3" * 12, "AKIA" + "AB12" * 4]
SECRETS = [*NAMED, *SHAPED, HEX]
HOSTS = ["node17", "cluster.example", "10.1.2.3", "fe80::17"]
PATHS = ["alice", "scratch", "venv", "private", "secret-project", "bob"]
COMMAND = [
    "/home/alice/venv/bin/python", "-u", "/home/alice/secret-project/recipes/grpo.py",
    "conf=/scratch/alice/confs/mine.yaml", "model.path=/scratch/alice/models/Qwen3-0.6B",
    f"task_args.api_key={NAMED[0]}", f"'task_args.judge={{password: {NAMED[1]}, tries: 3}}'",
    f"--token {NAMED[2]}", f"task_args.service=https://me:{NAMED[3]}@node17.cluster.example:80/v1",
    f"task_args.note={SHAPED[0]}", "task=judges:Judge", "reward.workers=2",
    f"WANDB_API_KEY={HEX}", "run_dir=~bob/runs/a",
]  # fmt: skip


def a_run(path: Path) -> Path:
    """A run whose files hold secrets and names in every place that is free text."""
    make_run(path, steps=20, tokens=6)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["model"]["path"] = "/scratch/alice/models/Qwen3-0.6B"
    config["task"] = "judges:Judge"
    config["task_args"] = {
        "api_key": NAMED[4], "judge": {"password": NAMED[5], "tries": 3}, "note": SHAPED[1],
        "service": f"https://me:{NAMED[3]}@node17.cluster.example:80/v1", "digits": 7,
        "file": "/scratch/alice/private/questions.jsonl", "listed": [SHAPED[3], "fine"],
    }  # fmt: skip
    config["of_another_version"] = {"wandb_api_key": HEX, "words": 2}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    ranks = [
        {"rank": rank, "host": "node17.cluster.example", "device": "a CPU"} for rank in range(2)
    ]
    more = {
        "command": " ".join(COMMAND), "ranks": ranks, "HF_TOKEN": NAMED[6],
        "variables": {"OMP_NUM_THREADS": "1", "HF_TOKEN": NAMED[7], "MASTER_ADDR": "10.1.2.3"},
    }  # fmt: skip
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT | more))
    (path / "environment-2.json").write_text(json.dumps(ENVIRONMENT | more))
    (path / "validation.json").write_text(f"token: {SHAPED[2]}, not JSON")
    with gzip.open(path / "samples.jsonl.gz", "ab") as file:
        file.write((json.dumps(row(20, "eval", "fixed", 9, 0, 5)) + "\n").encode())
    profiles = path / "profiles"
    profiles.mkdir()
    (profiles / "step-3-rank-0.txt").write_text("aten::mm 3 ms /home/alice/venv/lib/a.py(3)\n")
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The page of one run and of two, as it is and with all hidden."""
    path = tmp_path_factory.mktemp("alice")
    one, two = a_run(path / "one"), a_run(path / "two")
    changed = (two / "config.yaml").read_text().replace(NAMED[4], NAMED[8])
    (two / "config.yaml").write_text(changed.replace("digits: 7", "digits: 8"))
    (two / "metrics.jsonl").write_text("")
    broken = a_run(path / "broken")
    (broken / "config.yaml").write_text(f"task_args: {{api_key: {NAMED[4]}\n  x: [}}\n")
    runs = {"one": [one], "two": [one, two], "broken": [broken]}
    made = {}
    for name, paths in runs.items():
        for hide in ("", "hosts,paths"):
            output = path / f"{name}{len(hide)}.html"
            assert main([*map(str, paths), f"output={output}", f"hide={hide}"]) == 0
            made[f"{name} {hide}".strip()] = output.read_text()
    return made


def data_of(page: str) -> str:
    """The page's data, with the escapes of JSON resolved."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.dumps(json.loads(text), ensure_ascii=False)


@pytest.mark.parametrize("hide", ["", " hosts,paths"])
@pytest.mark.parametrize("name", ["one", "two", "broken"])
def test_no_page_has_a_secret(pages, name, hide):
    data = data_of(pages[name + hide])
    assert [secret for secret in SECRETS if secret in data or secret in pages[name + hide]] == []
    assert "(not shown)" in data


@pytest.mark.parametrize("name", ["one", "two", "broken"])
def test_a_page_that_hides_names_no_machine_path_or_user(pages, name):
    data = data_of(pages[f"{name} hosts,paths"])
    assert [word for word in (*HOSTS, *PATHS) if word in data] == []


def test_a_page_that_hides_nothing_names_them(pages):
    data = data_of(pages["one"])
    assert [word for word in ("node17", "alice", "questions.jsonl") if word not in data] == []


@pytest.mark.parametrize("name", ["one", "one hosts,paths"])
def test_what_is_no_secret_stays(pages, name):
    """The model's name, what was changed, versions, results, and rollouts."""
    data = data_of(pages[name])
    for word in (
        "Qwen3-0.6B",
        "judges:Judge",
        "tries",
        "digits",
        "2.13.0",
        "reward.workers=2",
        "What is 3 + 3?",
    ):
        assert word in data, word
    config = {entry["key"]: entry for entry in json.loads(data)["runs"][0]["config"]}
    assert config["task_args.api_key"]["value"] == "(not shown)"
    assert config["task_args.digits"]["value"] == "7"
    assert json.loads(data)["runs"][0]["curves"]
