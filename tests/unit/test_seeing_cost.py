"""tools.bench.seeing: the seconds of steps from outside, and what its tables are made of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.bench.measured_run import MeasuredRun, seconds_by_line
from tools.bench.seeing import Seen, ratios, read_words, report_bytes, report_steps, sizes
from tools.processes import cpu_seconds

LINES = ["123456789", "1234", "é", "1234"]  # which end after 10, 15, 18 and 23 bytes


def test_lines_between_two_looks_share_their_seconds():
    looks = [(0, 5.0, 0.0), (10, 100.0, 7.0), (12, 101.0, 8.0), (18, 104.0, 9.0), (18, 104.0, 9.5)]
    found = seconds_by_line([*looks, (23, 105.0, 11.0)], LINES)
    assert found == {1: (2.0, 1.0), 2: (2.0, 1.0), 3: (1.0, 2.0)}


def test_of_the_lines_of_the_first_look_nothing_is_known():
    assert seconds_by_line([(15, 100.0, 7.0), (23, 105.0, 11.0)], LINES) == {
        2: (2.5, 2.0),
        3: (2.5, 2.0),
    }
    assert seconds_by_line([], LINES) == {}


def a_run(tmp_path: Path, name: str, wall: float, cpu: float) -> Seen:
    """Of 8 steps, with an evaluation in the fifth and the last; the third one is slow."""
    run_dir = tmp_path / name
    (run_dir / "tensorboard").mkdir(parents=True)
    metrics = [{"step": s, "seconds/log": 0.001 * s} for s in range(9)]
    for step in (0, 5, 8):
        metrics[step]["seconds/eval"] = 1.0
    lines = dict.fromkeys(range(1, 9), (wall, cpu)) | {5: (50.0, 50.0), 3: (99.0, cpu)}
    return Seen(MeasuredRun(run_dir, metrics=metrics, lines=lines), None)


def test_steps_count_after_two_without_evaluations(tmp_path):
    run = a_run(tmp_path, "on", wall=0.5, cpu=0.25)
    assert run.steps == [3, 4, 6, 7]
    assert (run.step_seconds, run.cpu_seconds) == (0.5, 0.25)  # one slow step does not count
    assert run.log_seconds == pytest.approx(0.005)
    run.run.lines.clear()
    with pytest.raises(SystemExit, match="no step"):
        run.steps  # noqa: B018


def test_ratios_are_of_the_same_turn(tmp_path, capsys):
    assert ratios([3.0, 8.0], [2.0, 4.0]) == [1.5, 2.0]
    seen = {
        "on": [a_run(tmp_path, f"on-{n}", 0.5 * n, 0.3) for n in (1, 2)],
        "off": [a_run(tmp_path, f"off-{n}", 0.4 * n, 0.2) for n in (1, 2)],
    }
    report_steps(seen)
    rows = capsys.readouterr().out.splitlines()
    names = ("s to `off`", "CPU s to `off`", "s to `on`", "CPU s to `on`")
    assert rows[0].endswith(" | ".join(names) + " |")
    of_off, same = "1.250 (1.250 to 1.250) | 1.500 (1.500 to 1.500)", "1.000 (1.000 to 1.000)"
    assert rows[2] == f"| `on` | 0.7500 | 0.3000 | 5.00 | {of_off} | {same} | {same} |"
    assert rows[3].startswith(f"| `off` | 0.6000 | 0.2000 | 5.00 | {same} |")


def test_bytes_are_those_of_a_step_by_file(tmp_path, capsys):
    """A folder is one; what is written once is left out."""
    on, off = (a_run(tmp_path, name, 1.0, 1.0) for name in ("on", "off"))
    for run_dir, names in {
        on.run.run_dir: ("metrics.jsonl", "timeline.jsonl", "tensorboard/a", "tensorboard/b"),
        off.run.run_dir: ("metrics.jsonl", "config.yaml"),
    }.items():
        for name in names:
            (run_dir / name).write_bytes(b"x" * 16_000)
    expected = {"metrics.jsonl": 16_000, "timeline.jsonl": 16_000, "tensorboard": 32_000}
    assert sizes(on.run.run_dir) == expected
    report_bytes({"on": [on], "off": [off]})
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "| metrics.jsonl | 2,000 | 2,000 |",
        "| tensorboard | 4,000 | 0 |",
        "| timeline.jsonl | 2,000 | 0 |",
    ]


def test_options_are_ours_and_the_rest_is_the_recipes():
    options, words = read_words(["ways=off,on", "page=0", "steps=7", "output=/o"])
    assert (options["ways"], options["pairs"], options["output"]) == ("off,on", "3", "/o")
    assert words[-1] == "steps=7" and "eval.every=0" in words
    assert [word for word in words if word.startswith("steps=")] == ["steps=7"]
    for wrong in ("ways=on,loud", "pairs=0", "every=x", "page=-1", "tokens=40,"):
        with pytest.raises(SystemExit):
            read_words([wrong, "output=/o"])


def test_a_process_has_used_its_cpu_time():
    before = os.times()
    found = cpu_seconds(os.getpid())
    after = os.times()
    assert before.user + before.system - 0.02 <= found <= after.user + after.system + 0.02
