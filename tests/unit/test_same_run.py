"""What a checkpoint records of its run, and what refuses to go on from it: other keys, files,
prompts, fewer steps; changed code is a warning.

Whole runs that were edited: faults/test_two_runs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_checkpoint import advance, conf_of, trainer_of

from mesh.checkpoint.files import INDEX, read_index
from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.same_run import Inputs, configuration_problems
from mesh.config.changes import changed
from mesh.config.keys import Refusal
from mesh.lifecycle.process import Process
from mesh.program.shared import SAMPLE, SAMPLES, digest_of_file
from mesh.rl.samples import StepRecord

FILES = {"tokenizer.json of the tokenizer": "4000 bytes, digest 01"}
CODE = {"the task's module my_tasks": "1 byte, digest 02", "the loss's module my_loss": "no file"}


def drawn(step: int) -> str:
    return f"prompts of {step}"


INPUTS = Inputs(FILES, CODE, drawn)


@pytest.fixture
def resumed(process: Process, tmp_path) -> Callable[..., int]:
    """Two steps with INPUTS, of which both are kept; then the step that a resume of it loads."""
    path, conf = tmp_path / "run", conf_of("task_args.min_length=2", "model.max_length=64")
    path.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl.gz"):
        (path / name).touch()
    trainer = trainer_of(conf)
    keeper = Checkpointer(conf, path, process, trainer, INPUTS)
    for step in (1, 2):
        advance(trainer, step)
        keeper.trained(step, StepRecord({"digest/prompts": drawn(step)}))
        keeper.after(step, stop=step == 2)

    def resume(inputs: Inputs = INPUTS, **keys) -> int:
        values = {"resume": str(path)} | {k.replace("__", "."): v for k, v in keys.items()}
        own = changed(conf, values)
        return Checkpointer(own, path, process, trainer_of(own), inputs).load()

    return resume


def test_the_index_holds_what_the_run_computes_with(resumed, tmp_path):
    for step in (1, 2):
        inputs = read_index(tmp_path / "run" / "checkpoints" / f"step-{step}").inputs
        assert (inputs["files"], inputs["code"]) == (FILES, CODE)
        assert inputs["prompts"] == f"prompts of {step}"
        assert "  max_length: 64\n" in inputs["conf"] and "min_length: 2\n" in inputs["conf"]


def test_the_same_run_goes_on_without_a_word_and_so_does_one_that_was_moved(resumed, capsys):
    assert resumed() == 2
    assert resumed(run_dir="/elsewhere", checkpoint__keep=1, waves=2, steps=3) == 2
    assert resumed(model__path="package:qwen3_tiny", model__tokenizer="/elsewhere") == 2
    said = capsys.readouterr().out
    assert "warning" not in said and "older version" not in said and said.count("resumed from") == 3


def test_a_longer_context_may_be_given_and_left_out_again(resumed):
    assert resumed(model__max_length=96) == resumed(model__max_length=48) == 2
    skips = conf_of("overlong=skip", "model.max_length=64")
    for length, wrong in ((48, "with 64, which a resumed run may raise"), (96, "longer than 64")):
        (line,) = configuration_problems(skips, changed(skips, {"model.max_length": length}))
        assert line.startswith(f"model.max_length={length}: ") and wrong in line
    # a run that skipped once has left prompts out, whatever it does now
    stops = changed(skips, {"overlong": "stop", "model.max_length": 96})
    assert any("longer than 64" in line for line in configuration_problems(skips, stops))


def test_keys_that_were_edited_are_refused_with_both_values(resumed):
    with pytest.raises(Refusal) as caught:
        resumed(trainer__lr=0.006, loss="dr_grpo", task_args={"min_length": 3}, waves=2)
    title, *lines = str(caught.value).splitlines()
    assert title == "3 problems with the configuration:"
    remedy = "; put that back into RUN_DIR/config.yaml, or start a new run"
    assert all(line.endswith(remedy) for line in lines)
    assert [line.removesuffix(remedy) for line in lines] == [
        "- task_args={min_length: 3}: the run computes with {min_length: 2}",
        "- loss=dr_grpo: the run computes with grpo",
        "- trainer.lr=0.006: the run computes with 0.0006",
    ]


def test_other_files_and_prompts_are_refused_and_other_code_is_a_warning(resumed, capsys, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step-2"
    with pytest.raises(Refusal) as caught:
        resumed(Inputs({}, CODE, lambda step: "others"))
    _, first, second = str(caught.value).splitlines()
    assert first == (
        f"- {path}: tokenizer.json of the tokenizer is not the file that the run computes with; "
        "restore it, or start a new run"
    )
    assert second.startswith(
        f"- {path}: the task's prompts of step 2 are not those that the run drew (digest prompts "
        "of 2, now others); restore the task and its data, or start a new run; prompts must be"
    )
    capsys.readouterr()
    assert resumed(replace(INPUTS, code={"the task's module my_tasks": "2 bytes"})) == 2
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [line.partition(" has changed")[0] for line in warned] == [
        "warning: the task's module my_tasks",
        "warning: the loss's module my_loss",
    ]


def test_fewer_steps_than_were_taken_are_refused_before_anything_changes(resumed, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("not restored yet\n")
    with pytest.raises(Refusal, match="^steps=1: the run has taken 2 steps; use 2 or more"):
        resumed(steps=1)
    assert metrics.read_text() == "not restored yet\n"
    assert resumed(steps=2) == 2 and metrics.read_text() == ""


def test_a_checkpoint_of_an_older_version_says_that_it_could_not_be_checked(
    resumed, capsys, tmp_path
):
    path = tmp_path / "run" / "checkpoints" / "step-2"
    old = replace(read_index(path), inputs={}).to_json()
    (path / INDEX).write_text(old)
    assert resumed(Inputs({}, {}, lambda step: "others"), trainer__lr=0.5) == 2
    said = capsys.readouterr().out
    assert said.count(f"{path} was written by an older version: it could not be checked") == 1


def test_a_file_that_cannot_be_read_is_compared_by_that(tmp_path):
    """Reading it is refused later, with its key: here it would end the start with a traceback."""
    assert digest_of_file(tmp_path / "none") == "missing"
    assert digest_of_file(Path("/proc/self/mem")) == "not readable (Input/output error)"
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(SAMPLES * SAMPLE + 1))
    digest = digest_of_file(large)
    assert digest.startswith("262145 bytes, digest ") and digest == digest_of_file(large)
    large.write_bytes(bytes(SAMPLES * SAMPLE) + b"1")
    assert digest_of_file(large) != digest
