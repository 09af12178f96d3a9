"""Whole runs over prompts that ranks do not have alike, or that cannot be used at a later step."""

from __future__ import annotations

import re
import shutil

import pytest
from launching import Run, launch, run, runs

from mesh.runs.compare import untimed

WORDS = [
    "conf=qwen3_tiny", "num_prompts=4", "group_size=2", "eval.every=0", "eval.num_prompts=4",
    "eval.num_samples=1", "log.tensorboard=false", "log.samples=-1", "reward.workers=0",
]  # fmt: skip


def words_of(task: str, *more: str) -> list[str]:
    return [*WORDS, f"task=user_tasks:{task}", *more]


def test_a_task_without_a_seed_is_refused_at_the_start(tmp_path):
    """The two ranks of an engine would answer different questions."""
    words = words_of("Unseeded", "generator.tp=2", "trainer.tp=1", f"run_dir={tmp_path / 'run'}")
    result = launch("recipes/grpo.py", 2, *words, status=2)
    title, line = result.stderr.splitlines()[:2]
    assert title == "1 problem with the configuration:"
    assert line.startswith(
        "- rank 1 differs from rank 0 in the prompts of step 1: prompt 3 is Prompt("
    )
    assert "on rank 0 and Prompt(prompt_id=3, text=" in line and "no random numbers without" in line
    assert "failed (exitcode: 2)" in result.stderr and not (tmp_path / "run").exists()


def test_a_task_that_loses_its_seed_later_ends_the_run_at_that_step(tmp_path):
    words = words_of("Unseeded", "task_args.pure=2", "steps=5", f"run_dir={tmp_path / 'run'}")
    result = launch("recipes/grpo.py", 2, *words, status=1)
    where = "ValueError: rank 1 differs from rank 0 in the prompts of step 3: prompt 3 is Prompt("
    message = result.stderr[result.stderr.index(where) :]
    assert re.match(r".*prompt_id=3, .* on rank 0 and Prompt\(prompt_id=3, .* on rank 1; ", message)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3  # steps 0, 1, 2


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Run, str]:
    """A run whose third step has a prompt that is too long, after a checkpoint, and its errors."""
    path = tmp_path_factory.mktemp("long") / "run"
    words = words_of("LongLater", "steps=4", "checkpoint.every=1", f"run_dir={path}")
    result = launch("recipes/grpo.py", 1, *words, status=1)
    return Run(path, result.stdout), result.stderr


def test_a_prompt_that_is_too_long_later_ends_the_run_and_names_what_a_resumed_one_takes(ended):
    made, errors = ended
    assert [line["step"] for line in made.metrics] == [0, 1, 2]
    error = errors[errors.index("ValueError: step 3: model.max_length=32: the prompt 'zzz") :]
    assert error.splitlines()[0].endswith(
        "(1 of 4 prompts of step 3); use at least 39, shorter prompts, or overlong=skip; "
        "resume=RUN_DIR takes either key"
    )


def test_a_resumed_run_with_a_longer_context_is_the_one_that_always_had_it(ended, tmp_path):
    """To the bit, as is one that skips, up to the step that has something to skip."""
    for name in ("longer", "skips"):
        shutil.copytree(ended[0].path, tmp_path / f"{name}-run")
    always = words_of("LongLater", "steps=4")
    made = runs(
        tmp_path,
        1,
        {
            "longer": ("grpo", [f"resume={tmp_path / 'longer-run'}", "model.max_length=64"]),
            "skips": ("grpo", [f"resume={tmp_path / 'skips-run'}", "overlong=skip"]),
            "always longer": ("grpo", [*always, "model.max_length=64"]),
            "always skips": ("grpo", [*always, "overlong=skip"]),
        },
    )
    longer, skips = (Run(tmp_path / f"{name}-run", "") for name in ("longer", "skips"))
    for resumed, whole in ((longer, made["always longer"]), (skips, made["always skips"])):
        later = [untimed(line) for line in whole.metrics[3:]]
        assert [untimed(line) for line in resumed.metrics[3:]] == later and len(later) == 2
        assert resumed.samples == whole.samples
    assert [line.get("prompts/skipped") for line in skips.metrics[3:]] == [1.0, 1.0]
    long = {s["prompt"] for s in longer.samples if s["prompt_id"] == 2 and s["step"] > 2}
    other = {s["prompt"] for s in skips.samples if s["prompt_id"] == 2 and s["step"] > 2}
    assert long == {"z" * 30 + ">"} and len(other) == 2 and not other & long


@pytest.mark.parametrize("num_ranks", [2])
def test_a_task_has_ids_of_its_own(tmp_path, num_ranks):
    """They are keys into a table of the task; the program numbers prompts by their places."""
    made = run("recipes/grpo.py", tmp_path / "run", num_ranks, *words_of("Keyed", "steps=1"))
    assert made.metrics[1]["reward/mean"] > 0, "score gets the task's own ids"
    assert {s["prompt_id"] for s in made.samples} == {0, 1, 2, 3}
    for sample in made.samples:
        word = sample["prompt"][-2::-1].encode()
        assert sample["task_prompt_id"] == int.from_bytes(word) * (-1) ** len(word)
