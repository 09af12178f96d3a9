"""Launched recipes that are refused: before a model is built, or by their score function."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launching import REPOSITORY, launch

BAD_TASK = """
from dataclasses import dataclass

from mesh.tasks.spell_backward import SpellBackward


@dataclass(frozen=True)
class NotANumber(SpellBackward):
    def score(self, prompt, response):
        return float("nan") if prompt.prompt_id == 3 else 0.0


@dataclass(frozen=True)
class Raises(SpellBackward):
    def score(self, prompt, response):
        return {}["no such entry"]
"""


def test_run_directory_that_holds_a_run_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    words = ["conf=qwen3_tiny", f"run_dir={tmp_path}", "num_prompts=63"]
    result = launch("recipes/grpo.py", 2, *words, status=1)
    title, *found = result.stderr.splitlines()[:3]
    assert title == "2 problems with the configuration:"
    assert found[0].startswith(f"- run_dir={tmp_path}: already holds a run (metrics.jsonl)")
    assert found[1].startswith("- num_prompts=63: is not a multiple of 2")
    assert_only_torchrun_after(3, result.stderr)
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def assert_only_torchrun_after(ours: int, stderr: str) -> None:
    """After so many lines come torchrun's own, of one rank, and none of them is ours."""
    rest = stderr.splitlines()[ours:]
    assert len(rest) < 36 and rest[0].startswith("E") and "failed (exitcode: 2)" in rest[0]
    frames = [line.split('"')[1] for line in rest if line.startswith("  File")]
    assert not [frame for frame in frames if Path(frame).is_relative_to(REPOSITORY / "mesh")]
    assert "problem" not in "".join(rest) and "  <NO_OTHER_FAILURES>" in rest


def test_a_misspelt_key_is_two_lines():
    result = launch("recipes/grpo.py", 2, "conf=qwen3_tiny", "trainer.lrr=1", status=1)
    assert result.stderr.splitlines()[:2] == [
        "1 problem with the configuration:",
        "- trainer.lrr=1: unknown key; did you mean trainer.lr? --help lists all keys",
    ]
    assert_only_torchrun_after(2, result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "name, num_ranks, outcome",
    [("NotANumber", 2, "returned nan"), ("Raises", 1, "raised KeyError: 'no such entry'")],
)
def test_reward_function_that_fails_stops_the_run(tmp_path, name, num_ranks, outcome):
    (tmp_path / "bad_task.py").write_text(BAD_TASK)
    words = ["conf=qwen3_tiny", f"task=bad_task:{name}", "num_prompts=4", "eval.num_prompts=4"]
    words += [f"run_dir={tmp_path / 'run'}", "log.tensorboard=false"]
    began = time.monotonic()
    result = launch("recipes/grpo.py", num_ranks, *words, status=1, path=tmp_path)
    assert time.monotonic() - began < 150, "it waited for a time limit instead of ending"
    message = result.stderr[result.stderr.index("ValueError: the score function of ") :]
    first, prompt, response, answer, remedy = message.splitlines()[:5]
    assert first.startswith(f"ValueError: the score function of {name}(") and outcome in first
    word = prompt.partition("prompt:")[2].strip().strip("'").removesuffix(">")
    assert answer.partition("answer:")[2].strip() == repr(word[::-1])
    assert "response:" in response and "make it return one finite number" in remedy
    assert not (tmp_path / "run" / "model").exists()


def test_generate_refuses_a_file_whose_rows_are_no_prompts(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "abc>"}\n{"prompt": "a", "tokens": [1]}\n')
    words = ["conf=qwen3_tiny", f"generate.file={file}"]
    result = launch("recipes/generate.py", 2, *words, status=1)
    assert f"generate.file={file}: line 2 has prompt and tokens; write" in result.stderr
    assert result.stderr.count("line 2 has prompt and tokens") == 1, "one rank says it"


def test_generate_refuses_prompts_it_cannot_answer():
    long = "abcdefghijklmnopqrstuvwxyz>"
    words = ["conf=qwen3_tiny", f"generate.prompts=[abc>,{long}]"]
    result = launch("recipes/generate.py", 1, *words, status=1)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 2
    assert f"model.max_length=32: the prompt '{long}' has 27 tokens" in result.stderr
    assert "use at least 35" in result.stderr
