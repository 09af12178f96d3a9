"""Several runs: what differs, and the rungs of exactness with how they are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import ENVIRONMENT, make_run

from mesh.runs.compare import compare_runs
from tools.report.build import report_data
from tools.report.curves import points_of
from tools.report.exactness import PROMISES, exactness_of
from tools.report.main import main
from tools.report.reading import Run, read_run


def change(run_dir, step, **metrics):
    """Change metrics of one line."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[step] |= {name.replace("__", "/"): value for name, value in metrics.items()}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    a = make_run(tmp_path / "a", steps=20, prompts=0, words=("trainer.lr=1e-6",))
    b = make_run(tmp_path / "b", steps=20, prompts=0, words=("trainer.lr=0.0002",))
    return a, b


def test_runs_of_equal_metrics_are_said_to_be_equal(runs):
    change(runs[1], 5, seconds__train=9.0, host_gb=7.0)
    found = report_data(runs)["comparison"]
    assert found["first_difference"] is None
    assert found["text"] == (
        "Both runs have equal metrics, to the bit, in all 21 lines; times, rates and memory are "
        "not compared."
    )
    assert found["config"] == [{"key": "trainer.lr", "values": ["1.0e-06", "0.0002"]}]
    results = {row["label"]: row["values"] for row in found["results"]}
    assert results["steps"] == ["20", "20"]
    assert results["eval/accuracy"] == ["0.900 [0.857, 0.931]"] * 2
    assert report_data(runs[:1])["comparison"] is None


def test_the_first_difference_is_that_of_compare_runs(runs):
    change(runs[1], 7, loss=0.5)
    change(runs[1], 4, seconds__train=9.0, entropy=-0.0, equal_groups=0.25)
    for run in runs:  # the tool compares samples too
        (run / "samples.jsonl.gz").write_bytes(b"")
    found = report_data(runs)["comparison"]
    expected = compare_runs(*runs).first
    assert found["first_difference"] == {
        "step": 4, "metric": expected.key, "values": [str(expected.a), str(expected.b)],
        "text": f"{expected.key} of step 4 is the first that differs.",
    }  # fmt: skip
    assert "equal to the bit before step 4" in found["text"]
    change(runs[1], 0, eval__accuracy=0.5)
    assert report_data(runs)["comparison"]["text"] == (
        "The metrics differ from their first line on: eval/accuracy of step 0 is the first that "
        "differs."
    )


def test_of_three_runs_the_earliest_difference_counts(runs, tmp_path):
    third = make_run(tmp_path / "c", steps=20, prompts=0)
    change(runs[1], 9, loss=0.5)
    change(third, 3, loss=0.25)
    found = report_data([*runs, third])["comparison"]
    assert found["first_difference"]["step"] == 3
    assert found["first_difference"]["values"][2] == "0.25"
    assert len(found["results"][0]["values"]) == 3


@pytest.mark.parametrize("shorter", [0, 1])
def test_a_run_that_ends_before_the_other_differs_there(runs, shorter):
    path = runs[shorter] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:11]))
    found = report_data(runs)["comparison"]
    assert found["first_difference"]["step"] == 11 and not found["first_difference"]["metric"]
    assert f"run {shorter + 1} ends before" in found["text"]


def test_the_command_writes_a_page_of_several_runs(runs, tmp_path, capsys):
    output = tmp_path / "both.html"
    assert main([*map(str, runs), f"output={output}", "title=Two rates"]) == 0
    assert str(output) in capsys.readouterr().out
    assert "<title>Two rates</title>" in output.read_text()
    assert main([str(runs[0])]) == 0 and (runs[0] / "report.html").is_file()


def row(run, rung):
    (found,) = [row for row in exactness_of(run, points_of(run)) if row["rung"] == rung]
    return found["holds"], found["how"]


EXACT = {"batch_invariant": "true", "engine": "native", "check": "null"}
VALIDATION = {
    "keys": {"model.path": "package:qwen3_tiny", "model.flavor": "0.6B", "engine": "native",
             "vllm.model": "titan"},
    "machine": {"device": "a CPU", "environment": {"started": "2026-11-01"}},
    "checks": [{"rung": "L0", "result": "pass"}, {"rung": "L1", "result": "pass"},
               {"rung": "L1", "result": "FAIL"}, {"rung": "L3", "result": "not run"}],
}  # fmt: skip


def with_differences(*values, **settings):
    lines = [{"step": s, "logprob_diff/max": v} for s, v in enumerate(values, 1)]
    return Run(Path("nowhere"), metrics=lines, settings=EXACT | settings)


def test_l2_is_known_from_the_runs_own_tokens():
    assert row(with_differences(0.0, 0.0), "L2") == (
        "yes", "logprob_diff/max is exactly 0 in all 2 steps.")  # fmt: skip
    holds, how = row(with_differences(0.0, 0.0, check="strict"), "L2")
    assert holds == "yes" and "check=strict compared every token" in how
    holds, how = row(with_differences(0.0, 1e-7, 1e-6), "L2")
    assert holds == "no" and "from step 2 on, at most 1.0e-06 (step 3)" in how
    assert row(with_differences(0.0, None), "L2")[0] == "no"
    assert row(with_differences(0.0, 1e-7, batch_invariant="false"), "L2")[0] == "off"
    assert row(with_differences(), "L2")[0] == "unknown"
    assert row(Run(Path("nowhere")), "L1") == ("unknown", "The configuration cannot be read.")
    run = with_differences(1e-7)
    run.settings.clear()
    assert row(run, "L2")[0] == "unknown" and "was on is not known" in row(run, "L2")[1]


def test_l2_is_not_known_from_steps_that_compared_no_token():
    def trained(*tokens):
        lines = [{"step": s, "logprob_diff/max": 0.0, "tokens/trained": n}
                 for s, n in enumerate(tokens, 1)]  # fmt: skip
        return Run(Path("nowhere"), metrics=lines, settings=EXACT)

    assert row(trained(0, 0), "L2")[0] == "unknown"
    holds, how = row(trained(0, 7, 0), "L2")
    assert (holds, how[-52:]) == ("yes", "exactly 0 in the one step that trained on any token.")


def test_other_rungs_are_known_from_a_validation_of_the_same_machine(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=3, prompts=0, words=("batch_invariant=true",))
    assert row(read_run(run_dir), "L0")[0] == "unknown"
    beside = tmp_path / "validated"
    beside.mkdir()
    (beside / "validation.json").write_text(json.dumps(VALIDATION))
    run = read_run(run_dir)
    assert row(run, "L0") == (
        "yes", "recipes/validate.py, 2026-11-01, ../validated/validation.json: pass.")  # fmt: skip
    assert row(run, "L1")[0] == "no" and row(run, "L3")[0] == "unknown"
    assert row(run, "L2")[0] == "no", "the run's own tokens say otherwise"
    assert row(run, "L5")[0] == "unknown" and row(run, "L4")[0] == "off"
    run.environments = [ENVIRONMENT | {"ranks": [{"rank": 0, "device": "a GPU"}]}]
    assert row(run, "L0")[0] == "unknown", "another machine's validation says nothing"
    (run_dir / "validation.json").write_text(json.dumps(VALIDATION))
    assert row(read_run(run_dir), "L0")[0] == "yes"
    ordinary = make_run(tmp_path / "ordinary", steps=3, prompts=0)
    assert {row(read_run(ordinary), rung)[0] for rung in PROMISES} == {"off"}
