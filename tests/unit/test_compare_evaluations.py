"""Files of results: written, read, and compared by the command. Seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mesh.lifecycle.process import Process
from mesh.roles.evaluation import Evaluation
from mesh.runs.evaluations import compare_results, read_results, results_path, write_results
from tools import compare_evaluations


def row(index: int, metrics: dict[str, float], name: str = "") -> dict[str, Any]:
    question = {"question": f"{name}{index}>", "answer": str(index)}
    return {"set": name, "index": index, **question, "metrics": metrics}


def evaluation(shift: float, num: int = 60) -> dict[str, Evaluation]:
    """Problems that differ a lot among each other, each better by the shift; and another set."""
    numbers = random.Random(0)
    rows = [row(i, {"accuracy": numbers.gauss(0, 1) + shift, "reward": 0.5}) for i in range(num)]
    rows[1]["metrics"]["reward/format"] = 1.0
    other = [row(i, {"accuracy": numbers.random()}, "cold") for i in range(5)]
    return {"": Evaluation({}, {}, rows), "cold": Evaluation({}, {}, other)}


@pytest.fixture
def files(process: Process, tmp_path: Path) -> tuple[Path, Path]:
    paths = results_path(tmp_path, 0), results_path(tmp_path, 10)
    for path, shift in zip(paths, (0.0, 0.1), strict=True):
        write_results(path, evaluation(shift), process)
    return paths


def test_what_was_written_is_read_and_nothing_else_is_left(files):
    rows = read_results(files[0])
    found = evaluation(0.0)
    assert rows == [*found[""].rows, *found["cold"].rows]
    assert sorted(path.name for path in files[0].parent.iterdir()) == [
        "step-0.jsonl", "step-10.jsonl",
    ]  # fmt: skip


def test_rows_are_in_order_whoever_had_them(process, tmp_path):
    found = evaluation(0.0, num=4)
    found[""].rows.reverse()
    write_results(tmp_path / "a.jsonl", found, process)
    rows = read_results(tmp_path / "a.jsonl")
    assert [(r["set"], r["index"]) for r in rows[:5]] == [*(("", i) for i in range(4)), ("cold", 0)]


def test_a_file_that_cannot_be_written_is_named(process, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"file/a.jsonl: cannot be written \("):
        write_results(tmp_path / "file" / "a.jsonl", evaluation(0.0), process)


def test_a_difference_smaller_than_the_intervals_is_found_by_pairs(files):
    compared = compare_results(*map(read_results, files))
    assert [(c.set, c.metric) for c in compared] == [
        ("", "accuracy"), ("", "reward"), ("", "reward/format"), ("cold", "accuracy"),
    ]  # fmt: skip
    own, reward, part, cold = compared
    assert own.a.low < own.b.mean < own.a.high
    assert own.difference.low == pytest.approx(0.1) == own.difference.high
    assert (reward.a.mean, reward.difference.high) == (0.5, 0.0)
    assert (part.a.mean, part.a.low, part.a.high) == (1.0, 1.0, 1.0), "of the problem that has it"
    assert cold.difference.mean == 0 and cold.a.high - cold.a.low > 0.1
    assert compare_results(*map(read_results, files)) == compared, "it repeats"


def test_the_command_says_what_differs(files, capsys):
    assert compare_evaluations.main([str(path) for path in files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "65 problems" and lines[1].split() == ["metric", "A", "B", "B", "-", "A"]
    words = [" ".join(line.split()) for line in lines[2:]]
    assert words[0].endswith("+0.1000 [+0.1000, +0.1000] *")
    assert words[1] == (
        "reward 0.5000 [0.5000, 0.5000] 0.5000 [0.5000, 0.5000] +0.0000 [+0.0000, +0.0000]"
    )
    assert words[3].startswith("cold/accuracy ") and not words[3].endswith("*")


def test_other_questions_are_refused_with_the_first(files, process, tmp_path, capsys):
    def refused(change: Any) -> str:
        rows = [json.loads(line) for line in files[0].read_text().splitlines()]
        other = tmp_path / "other.jsonl"
        other.write_text("".join(f"{json.dumps(r)}\n" for r in change(rows)))
        assert compare_evaluations.main([str(files[0]), str(other)]) == 2
        return capsys.readouterr().err.removeprefix("cannot be compared: ")

    assert refused(lambda rows: rows[:59] + rows[60:]).startswith(
        "they have other questions, so that nothing compares: problem 59 is ('59>', '59') in the "
        "first, missing in the second; evaluate both on"
    )
    assert "problem 2 of the set cold is ('cold2>', '2') in the first, ('x', '2')" in refused(
        lambda rows: [r | {"question": "x"} if r["question"] == "cold2>" else r for r in rows]
    )
    assert refused(lambda rows: rows[:60]) == (
        "they have other sets: the run's own, cold and the run's own\n"
    )
    assert refused(lambda rows: [*rows, rows[0]]) == (
        "66 lines have 65 problems: one is there twice\n"
    )
    other = tmp_path / "other.jsonl"
    assert refused(lambda rows: [{"step": 1}]) == (
        f"{other}: line 1 has no set; name a file that eval.results or log.evaluations wrote\n"
    )
    assert refused(lambda rows: []).startswith(f"{other}: has no line; name a file of results")
    assert compare_evaluations.main([str(files[0])]) == 2
    assert "python tools/compare_evaluations.py A B" in capsys.readouterr().err
