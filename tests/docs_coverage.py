"""How each command of the documentation is tested: run as it stands, or by the test named here."""

from __future__ import annotations

import re

from docs_reading import PAGES, Command, commands

CI = ".ci/run"
RECIPES = "tests/distributed/test_recipes.py"
PROGRAMS = "tests/distributed/test_programs.py"
RESUME = "tests/faults/test_resume.py"
OPTIMIZER = "tests/distributed/test_optimizer_runs.py"
COVERED = {
    # the README's block under "Tests" is what .ci/run executes
    "ruff format --check . && ruff check .": CI,
    "mypy && mypy recipes tools": CI,
    "mypy": CI,
    "OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile": CI,
    "OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile tests/unit": CI,
    # layouts of several ranks
    "torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny":
        f"{RECIPES}::test_run_directory_and_last_line",
    "torchrun --nproc-per-node=4 recipes/grpo.py conf=qwen3_tiny mesh.mode=split "
    "trainer.dp_shard=2 generator.tp=2":
        f"{RECIPES}::test_first_step_draws_the_same_tokens_on_any_layout",
    "torchrun --nproc-per-node=4 recipes/grpo.py resume=RUN_DIR trainer.tp=2 mesh.mode=split":
        f"{RESUME}::test_continues_on_four_ranks_with_tensor_parallelism_then_split_until_ctrl_c",
    "torchrun --nproc-per-node=4 recipes/validate.py conf=qwen3_tiny":
        "tests/distributed/test_validate.py::test_every_rung_holds_on_four_ranks_in_every_layout",
    "torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny batch_invariant=true check=strict":
        "tests/distributed/test_strict.py::"
        "test_an_exact_run_finishes_with_the_same_metrics",
    "torchrun --nproc-per-node=2 -m mesh.recipes.grpo conf=qwen3_tiny":
        "tests/distributed/test_wheel.py::test_two_ranks_train_from_any_directory",
    "torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny engine=vllm":
        "tests/engine/test_vllm_recipe.py::test_the_command_trains_strictly_and_ends_well",
    # what others watch more closely
    "torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny steps=5 profile.steps=[3]":
        "tests/distributed/test_timeline_runs.py::"
        "test_a_profile_has_all_phases_and_the_operators_forward_and_backward",
    "torchrun --nproc-per-node=2 --max-restarts=2 recipes/grpo.py conf=qwen3_tiny "
    "checkpoint.every=10": f"{RESUME}::test_torchrun_restarts_it_by_itself",
    "torchrun --nproc-per-node=2 recipes/evaluate.py conf=qwen3_tiny "
    "model.path=RUN_DIR/best/step-N":
        f"{RECIPES}::test_evaluate_alone_gives_the_numbers_of_the_run",
    "torchrun --nproc-per-node=2 recipes/sft.py conf=qwen3_tiny model.init=random":
        f"{PROGRAMS}::test_supervised_steps_lower_the_cross_entropy",
    "cat questions.txt | torchrun recipes/generate.py conf=qwen3_tiny generate.prompts=-":
        f"{PROGRAMS}::test_generate_reads_stdin_and_samples",
    "torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny trainer.decay=cosine "
    "trainer.lr_floor=0.1":
        "tests/faults/test_optimizer_resumed.py::"
        "test_killed_and_resumed_is_the_run_that_was_never_killed",
    "torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny ema=0.99":
        f"{OPTIMIZER}::test_the_average_changes_evaluations_and_nothing_else",
    "torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny stop.above=0.3 stop.after=5":
        f"{OPTIMIZER}::test_patience_ends_the_run_with_a_model_and_a_checkpoint",
    "python tools/watch.py RUN_DIR":
        "tests/unit/test_watch.py::test_the_command_begins_before_the_run_and_ends_well",
    "python tools/compare_runs.py A B":
        "tests/unit/test_compare.py::test_the_command_says_equal_different_or_unreadable",
    "python tools/report.py RUN_DIR OTHER_RUN output=both.html":
        "tests/unit/test_report_comparison.py::test_the_command_writes_a_page_of_several_runs",
    "python tools/compare_evaluations.py A B":
        "tests/unit/test_compare_evaluations.py::test_the_command_says_what_differs",
    "python tools/chaos.py conf=qwen3_tiny rounds=50":
        "tests/faults/test_chaos.py::test_killed_while_it_writes_a_checkpoint_and_resumed",
    "python tools/monarch.py recipes/grpo.py procs=4 conf=qwen3_tiny checkpoint.every=10":
        "tests/faults/test_monarch.py::test_killed_and_resumed_by_itself_is_the_run_under_torchrun",
}  # fmt: skip
LAUNCHERS = re.compile(r"(torchrun( --nproc-per-node=\d+)?|python( -m)?) ")
"""How a command begins that can be run as it stands; `export A=B` sets what the next ones see."""
INSTALLS = ("python3 -m venv ", "pip install ", "pip uninstall ")


def to_run() -> list[Command]:
    """The commands that tests/distributed/test_docs_commands.py runs, in order: all that say
    nothing else of themselves, and of which nothing else is known here."""
    return [
        command
        for page in PAGES
        for command in commands(page)
        if not (command.needs or command.text in COVERED or command.text.startswith(INSTALLS))
    ]
