"""Real runs on a terminal, ended in every way: the terminal is whole, and keeps their table."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import time
from pathlib import Path

from foreground import steps_of
from launching import REPOSITORY, TORCHRUN
from terminal import OnTerminal

from mesh.lifecycle.guard import ECHO_SECONDS

CTRL_C = "\x03"
WORDS = ["conf=qwen3_tiny", "num_prompts=8", "group_size=4", "steps=100000", "eval.every=2"]
WORDS += ["eval.num_prompts=8", "log.tensorboard=false", "mesh.mode=colocated"]
WORDS += ["task=user_tasks:Troubled", "reward.workers=0"]
FIRST_WORDS = ["step", "reward", "length", "gen", "run"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
ENVIRONMENT["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
HIDES = b"\x1b[?25l"


def started(run_dir: Path, num_ranks: int, **env: str) -> OnTerminal:
    """A run of this terminal that shows a table of a step that was trained on."""
    launcher = [*TORCHRUN, f"--nproc-per-node={num_ranks}"] if num_ranks > 1 else [sys.executable]
    program = [*launcher, str(REPOSITORY / "recipes/grpo.py"), *WORDS, f"run_dir={run_dir}"]
    job = OnTerminal(program, ENVIRONMENT | env)
    job.wait_for(lambda rows: len(table(rows)) == len(FIRST_WORDS))
    return job


def table(rows: list[str]) -> list[str]:
    """The rows of the last table, where it is complete."""
    words = [row.split(" ", 1)[0] for row in rows]
    for first in reversed(range(len(rows))):
        if words[first : first + len(FIRST_WORDS)] == FIRST_WORDS and "ETA" in rows[first]:
            return rows[first : first + len(FIRST_WORDS)]
    return []


def check_whole(job: OnTerminal) -> list[str]:
    """The rows below the table; exactly one table is on the terminal, and all rows of it."""
    rows = job.screen.rows
    found = table(rows)
    assert re.match(r"step +\d+/100000  ─{12}  elapsed [\d:]+  ETA [\d:]+", found[0]), found
    assert re.match(
        r"reward \d\.\d{3} [▁-█]+ \d\.\d{3}  eval \d\.\d{3} [▁-█]+ \d\.\d{3}$", found[1]
    )
    assert re.match(r"length [\d.]+ +truncated \d+% +entropy [\d.]+ +logprob_diff \S+$", found[2])
    assert re.match(r"gen \S+ tok/s +train \S+ tok/s +\S+ s/step$", found[3]), found
    assert sum("ETA" in row and "━" in row or "─" in row for row in rows) == 1, rows
    assert HIDES not in job.raw and job.screen.cursor_shown and job.screen.column == 0
    assert termios.tcgetattr(job.keyboard)[:4] == job.settings[:4]
    return rows[rows.index(found[-1], rows.index(found[0])) + 1 :]


def test_ctrl_c_ends_the_run_after_the_step_and_leaves_its_table(tmp_path):
    job = started(tmp_path / "run", 2)
    job.press(CTRL_C)
    job.finish()
    below = "".join(check_whole(job))
    assert "stopping at the end of this step" in below
    last = steps_of(tmp_path / "run")[-1]
    assert f"stopped  {last}/100000 steps" in below
    assert f"step {last:4}/100000  reward" in below  # once the terminal is left, steps are lines


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    job = started(tmp_path / "run", 1, TROUBLE_STEP="3", TROUBLE_HANGS="1")
    job.wait_for(lambda rows: re.match(r"step +2/.*generate 0:01", table(rows)[0]) is not None)
    job.press(CTRL_C)
    job.wait_for(lambda rows: any("Ctrl-C again ends at once" in row for row in rows))
    time.sleep(2 * ECHO_SECONDS)  # a signal that comes sooner is taken for the same key
    job.press(CTRL_C)
    assert job.finish() == 130
    assert "stopped: ended at once" in "".join(check_whole(job))


def test_sigterm_leaves_the_table(tmp_path):
    job = started(tmp_path / "run", 1)
    os.kill(job.popen.pid, signal.SIGTERM)
    assert job.finish() == 0
    assert f"stopped  {steps_of(tmp_path / 'run')[-1]}/" in "".join(check_whole(job))


def test_kill_9_leaves_the_table(tmp_path):
    job = started(tmp_path / "run", 1)
    os.kill(job.popen.pid, signal.SIGKILL)
    assert job.finish() == -signal.SIGKILL
    assert check_whole(job) == [""]


def test_an_error_of_another_rank_is_printed_below_the_table(tmp_path):
    job = started(tmp_path / "run", 2, TROUBLE_STEP="6", TROUBLE_RANK="1")
    assert job.finish() == 1
    below = check_whole(job)
    assert "RuntimeError: the judge does not answer" in "".join(below)


def test_lines_of_a_dumb_terminal(tmp_path):
    words = [*WORDS, "steps=2", f"run_dir={tmp_path / 'run'}"]
    program = [sys.executable, str(REPOSITORY / "recipes/grpo.py"), *words]
    job = OnTerminal(program, ENVIRONMENT | {"TERM": "dumb"}, width=200)
    assert job.finish() == 0
    rows = job.screen.rows
    assert rows[0] == f"run {tmp_path / 'run'}"
    assert [row.split("  eval")[0] for row in rows[1:2]] == ["step    0/2"]
    assert [row.partition("reward")[0] for row in rows[2:4]] == ["step    1/2  ", "step    2/2  "]
    assert b"\x1b" not in job.raw
