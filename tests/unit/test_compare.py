"""When two runs are the same, and what is named where they are not; no real runs here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import REPOSITORY

from mesh.config.loading import save_conf
from mesh.config.schema import Conf
from mesh.recipes.replay import main as replay_main
from mesh.runs.compare import compare_runs, different, untimed
from mesh.runs.lines import read_lines
from mesh.runs.replay import LoggedStep, ReplayComparison, as_logged, cautions, logged_step
from mesh.runs.samples import SAMPLES as FILE
from mesh.runs.samples import member_of, read_samples

METRICS: list[dict[str, Any]] = [
    {"step": 0, "eval/accuracy": 0.5},
    {"step": 1, "loss": 0.1, "grad_norm": None, "seconds/train": 1.5},
    {"step": 2, "loss": 0.2, "grad_norm": 3.0, "tokens_per_second/train": 9.0},
]
SAMPLES: list[dict[str, Any]] = [
    {"step": 1, "prompt_id": 7, "sample_id": 0, "response": "cba", "reward": 1.0},
    {"step": 2, "prompt_id": 9, "sample_id": 0, "response": "täc", "reward": 0.0},
    {"step": 2, "prompt_id": 9, "sample_id": 1, "response": "", "reward": 1.0},
]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    if path.name == FILE:
        path.write_bytes(b"".join(member_of([line]) for line in lines))
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def made(path: Path) -> Path:
    (path / "model").mkdir(parents=True)
    (path / "model" / "model.safetensors").write_bytes(b"weights")
    (path / "model" / "config.json").write_text("{}")
    write(path / "metrics.jsonl", METRICS)
    write(path / FILE, SAMPLES)
    return path


def with_line(path: Path, file: str, number: int, **values: Any) -> None:
    lines = read_samples(path) if file == FILE else read_lines(path / file)
    lines[number] |= values
    write(path / file, lines)


CHANGES = {
    "metrics.jsonl step 2: loss differs: 0.2 and 0.25": lambda p: with_line(
        p, "metrics.jsonl", 2, loss=0.25
    ),
    "metrics.jsonl step 1: grad_norm differs: null and 0.0": lambda p: with_line(
        p, "metrics.jsonl", 1, grad_norm=0.0
    ),
    "metrics.jsonl step 1: kl differs: nothing and null": lambda p: with_line(
        p, "metrics.jsonl", 1, kl=None
    ),
    "metrics.jsonl: line differs: \"step 2\" and nothing": lambda p: write(
        p / "metrics.jsonl", METRICS[:2]
    ),
    "samples.jsonl.gz step 2 prompt_id 9 sample_id 0: reward differs: 0.0 and -0.0": lambda p: (
        with_line(p, FILE, 1, reward=-0.0)
    ),
    "samples.jsonl.gz step 2 prompt_id 9 sample_id 0: response differs: \"täc\" and \"tac\"": (
        lambda p: with_line(p, FILE, 1, response="tac")
    ),
    "samples.jsonl.gz: line differs: nothing and \"step 2 prompt_id 9 sample_id 1\"": (
        lambda p: write(p / FILE, [*SAMPLES, SAMPLES[2]])
    ),
    "model/model.safetensors: SHA-256 differs": lambda p: (
        p / "model" / "model.safetensors"
    ).write_bytes(b"Weights"),
    "model/more: SHA-256 differs: nothing and": lambda p: (p / "model" / "more").write_text(""),
    "model/config.json: SHA-256 differs": lambda p: shutil.rmtree(p / "model"),
}  # fmt: skip


@pytest.mark.parametrize("said", CHANGES)
def test_the_first_difference_is_named(said, tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    assert compare_runs(a, b).first is None
    CHANGES[said](b)
    assert str(compare_runs(a, b).first).startswith(said)


def test_the_last_best_models_are_compared_where_both_runs_keep_one(tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    for run, steps in ((a, (9, 10)), (b, (2, 10))):
        for step in steps:
            best = run / "best" / f"step-{step}"
            best.mkdir(parents=True)
            (best / "model.safetensors").write_bytes(b"%d" % step)
        assert str(compare_runs(a, b).first) == "None"
    (b / "best" / "step-11.partial").mkdir()
    assert compare_runs(a, b).files == 3
    (b / "best" / "step-10" / "model.safetensors").write_bytes(b"11")
    assert str(compare_runs(a, b).first).startswith("best/step-10/model.safetensors: SHA-256")
    (b / "best" / "step-10").rename(b / "best" / "step-11")
    said = "best/step-10/model.safetensors: SHA-256 differs: "
    first = str(compare_runs(a, b).first)
    assert first.startswith(said) and first.endswith(" and nothing")


def test_timings_memory_and_other_files_are_left_out(tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    machine = {
        "seconds/generate": 7.0, "gpu_gb/train": 39.2, "host_gb": 0.6, "mfu/train": 0.4,
        "sync/gb": 0.002, "sync/gb_per_second": 0.2, "tokens_per_second/train": 9.0,
    }  # fmt: skip
    lines = [untimed(line) | machine for line in METRICS]
    write(b / "metrics.jsonl", lines)
    (b / "config.yaml").write_text("seed: 1")
    compared = compare_runs(a, b)
    assert compared.first is None
    assert (compared.steps, compared.samples, compared.files) == (3, 3, 2)


def test_numbers_are_compared_to_the_bit():
    assert different({"a": 1.0, "b": 0.1 + 0.2}, {"b": 0.3, "a": 1.0}) == ["b"]
    assert different({"a": 1.0, "b": 0.0, "c": True}, {"a": 1, "b": -0.0, "c": 1}) == list("abc")
    assert different({"a": None, "b": "nothing"}, {"c": 1}) == ["a", "b", "c"]
    assert different({"a": [1, {"x": 2, "y": 3}]}, {"a": [1, {"y": 3, "x": 2}]}) == []


def command(*words: object) -> subprocess.CompletedProcess[str]:
    program = REPOSITORY / "tools" / "compare_runs.py"
    return subprocess.run(
        [sys.executable, str(program), *map(str, words)], capture_output=True, text=True
    )


def test_the_command_says_equal_different_or_unreadable(tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    result = command(a, b)
    expected = "equal: 3 lines of metrics, 3 samples, 2 files of models\n"
    assert (result.returncode, result.stdout) == (0, expected)
    with_line(b, "metrics.jsonl", 1, loss=0.5)
    result = command(a, b)
    expected = "different: metrics.jsonl step 1: loss differs: 0.1 and 0.5\n"
    assert (result.returncode, result.stdout) == (1, expected)
    with (b / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    result = command(a, b)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{b}/metrics.jsonl: line 4 is not a complete JSON object" in result.stderr
    result = command(a, tmp_path / "c")
    assert result.returncode == 2
    assert f"{tmp_path}/c/metrics.jsonl: No such file" in result.stderr
    assert command(a).returncode == 2


def test_a_logged_step_of_a_killed_run(tmp_path):
    """The last line was cut short; a line that cannot be read before it is an error."""
    path = made(tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as lines, (path / FILE).open("ab") as samples:
        lines.write('{"step": 3, "re')
        samples.write(member_of([{"step": 3, "re": 1}])[:-1])
    step = logged_step(path, 2)
    assert step.metrics == {"loss": 0.2, "grad_norm": 3.0}
    assert [s["response"] for s in step.samples] == ["täc", ""]
    assert not step.evaluated
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"step={wrong}: .* has logged steps 1 to 2; choose"):
            logged_step(path, wrong)
    write(path / "metrics.jsonl", METRICS[:1])
    with pytest.raises(ValueError, match="has logged no step"):
        logged_step(path, 1)
    (path / "metrics.jsonl").write_text("[]\n" + json.dumps(METRICS[1]) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl: line 1 is not a complete"):
        logged_step(path, 1)


REFUSED = {
    "": "no word: write torchrun --nproc-per-node=RANKS recipes/replay.py RUN_DIR step=K",
    "RUN": "RUN: write torchrun",
    "step=1": "step=1: write torchrun",
    "RUN step=x": "RUN step=x: write torchrun",
    "run_dir=RUN step=1": "run_dir=RUN step=1: write torchrun",
    "RUN step=3": "step=3: RUN has logged steps 1 to 2; choose a step",
    "RUN step=2 trainer.lr=1": "trainer.lr=1.0: the run computes with",
    "NONE step=2": "resume=NONE: holds no run",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_replayed_is_refused_before_anything_is_built(words, tmp_path, capsys):
    save_conf(Conf(), made(tmp_path / "run") / "config.yaml")
    names = {"RUN": str(tmp_path / "run"), "NONE": str(tmp_path / "none")}
    with pytest.raises(SystemExit) as caught:
        replay_main([names.get(word, word) for word in words.split()])
    assert caught.value.code == 2
    said = capsys.readouterr().err.replace(names["RUN"], "RUN").replace(names["NONE"], "NONE")
    assert REFUSED[words] in said and "Error" not in said


def test_a_replay_names_what_differs():
    sample = {"prompt_id": 1, "sample_id": 0, "prompt": "ab>", "response": "ba", "answer": "ba",
              "prompt_text": "ab>", "reward": 1.0, "advantage": 0.5,
              "finish_reason": "stop"}  # fmt: skip
    others = [sample | {"sample_id": i, "reward": float(i)} for i in (1, 2, 3)]
    again = as_logged(
        {"loss": 0.5, "kl": float("nan"), "seconds/x": 1.0, "gpu_gb/x": 2.0}, [sample, *others]
    )
    assert again.metrics == {"loss": 0.5, "kl": None}
    same = ReplayComparison(LoggedStep({"loss": 0.5, "kl": None}, [sample, others[1]]), again)
    assert same.equal and same.verdict() == "equal to the bit: 2 metrics, 2 samples"
    assert [line.endswith("equal") for line in same.sample_table(1)] == [False, True]
    assert len(same.sample_table(-1)) == 3 and len(same.sample_table(0)) == 1
    one = ReplayComparison(
        LoggedStep(again.metrics, [sample, others[1] | {"advantage": 0.25}]), again
    )
    assert not one.equal and one.verdict() == "DIFFERENT: no metric; 1 of 2 samples"
    wrong = [sample, others[0], others[1] | {"advantage": 0.25}, sample | {"prompt_id": 2}]
    other = ReplayComparison(LoggedStep({"loss": 0.75, "kl": None, "entropy": 1.0}, wrong), again)
    assert not other.equal
    assert other.verdict() == "DIFFERENT: loss, entropy; 2 of 4 samples"
    table = other.sample_table(0)
    assert len(table) == 5 and table[1].endswith("differs: advantage")
    assert "0.25" in table[1] and "0.5" in table[2]
    assert "differs: prompt_id" in table[3] and "nothing" in table[4]
    rows = {line.split()[0]: line.split()[1:] for line in other.metric_table()[1:]}
    assert rows == {
        "entropy": ["1.0", "nothing", "differs"], "kl": ["null", "null", "equal"],
        "loss": ["0.75", "0.5", "differs"],
    }  # fmt: skip


def test_a_replay_on_another_mesh_says_so(tmp_path):
    starts = {
        "environment.json": (2, "python recipes/grpo.py conf=qwen3_tiny trainer.tp=2"),
        "environment-2.json": (4, "python recipes/grpo.py resume=x trainer.tp=4 steps=9"),
    }
    for name, (ranks, words) in starts.items():
        environment = {"world_size": ranks, "command": words}
        (tmp_path / name).write_text(json.dumps(environment))
        before = cautions(tmp_path, True, ["log.samples=3"], 2)
        assert before == [] or name == "environment-2.json"
    said = "the run used {}, this replay uses {}: bits may differ".format
    assert before == [said("4 ranks trainer.tp=4", "2 ranks")]
    assert cautions(tmp_path, True, ["trainer.tp=4"], 4) == [
        said("2 ranks", "4 ranks trainer.tp=4")
    ]
    assert cautions(tmp_path, False, [], 1)[0].startswith("batch_invariant=false")
    assert len(cautions(tmp_path, True, ["trainer.lr=1"], 1)) == 2
