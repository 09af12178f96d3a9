"""The rollouts of a report: a choice that is spread over the run and fits into its budget."""

from __future__ import annotations

import gzip
import json

import pytest
from report_runs import make_run, member

from tools.report.build import report_data
from tools.report.html import embedded, page
from tools.report.reading import read_run
from tools.report.rollouts import index_of
from tools.report.samples import LONGEST, Known, Shown, numbers, samples_of

LARGEST = 5_000_000


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run", steps=40, tokens=30, prompts=3)


def groups_of(rows):
    found = {}
    for row in rows:
        found.setdefault((row["step"], row["split"], row["prompt_id"]), []).append(row)
    return found


def test_all_rollouts_of_a_small_run_are_shown_as_they_are(run_dir):
    run = read_run(run_dir)
    found = samples_of(run, budget=20_000_000)
    index = index_of(run.samples)
    assert found["kept"] == found["total"] == index.rows == 40 * 3 * 8 + 5 * 4 * 3
    row = next(r for r in found["rows"] if r["split"] == "train")
    assert row["step"] == 1 and row["chosen"] == "best" and row["reward"] == 1
    assert "".join(row["token_texts"]) == row["response"]
    for key in ("logprobs", "logprob_diffs", "entropies"):
        assert len(row[key]) == len(row["token_texts"])
    assert not {"tokens", "prompt_tokens"} & row.keys()
    assert [r["step"] for r in found["rows"]] == sorted(r["step"] for r in found["rows"])


@pytest.mark.parametrize("budget", [60_000, 250_000])
def test_a_budget_is_kept_by_whole_groups_from_all_over_the_run(run_dir, budget):
    found = samples_of(read_run(run_dir), budget=budget)
    assert 0.5 * budget < len(embedded(found["rows"])) <= 1.02 * budget
    groups = groups_of(found["rows"])
    assert {len(group) for key, group in groups.items() if key[1] == "train"} == {8}
    assert {len(group) for key, group in groups.items() if key[1] == "eval"} == {3}
    steps = {key[0] for key in groups if key[1] == "train"}
    assert {1, 40} <= steps and any(15 <= step <= 25 for step in steps)
    evaluated = {key for key in groups if key[1] == "eval"}
    assert {step for step, _, _ in evaluated} >= {0, 40}
    assert {prompt for _, _, prompt in evaluated} == {0, 1, 2, 3}
    of_first = {row["chosen"] for row in found["rows"] if row["step"] == 1}
    assert {"best", "worst"} <= of_first
    assert all(any("token_texts" in row for row in group) for group in groups.values())


def test_long_texts_keep_their_ends_and_lose_their_tokens(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=1, prompts=0)
    text = "a" * 50_000 + "z" * 50_000
    row = {"step": 1, "split": "train", "set": "", "chosen": "best", "prompt_id": 0,
           "sample_id": 0, "prompt": "p", "response": text, "reward": 0.5,
           "turns": [{"text": text, "sampled": True, "num_tokens": 9}, "no turn"],
           "messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}],
           "token_texts": ["a"] * 9, "logprobs": [-1.0] * 9}  # fmt: skip
    (run_dir / "samples.jsonl.gz").write_bytes(member([row]))
    (shown,) = samples_of(read_run(run_dir))["rows"]
    assert shown["cut"] == 2 * (100_000 - LONGEST) and "token_texts" not in shown
    assert len(shown["response"]) < 17_000 and "84,000 characters left out" in shown["response"]
    assert shown["response"].startswith("aaa") and shown["response"].endswith("zzz")
    assert shown["turns"] == [{"text": shown["response"], "sampled": True, "num_tokens": 9}]
    assert json.loads(shown["messages"][0]["content"]) == [{"type": "text", "text": "part"}]


def test_a_group_of_many_long_responses_is_whole_with_shorter_texts(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=1, prompts=0)
    rows = [{"step": 1, "split": "train", "set": "", "chosen": "best", "prompt_id": 0,
             "sample_id": sample, "prompt": "p", "response": "r" * 15_000, "reward": 0.5}
            for sample in range(256)]  # fmt: skip
    (run_dir / "samples.jsonl.gz").write_bytes(member(rows))
    found = samples_of(read_run(run_dir), budget=400_000)
    assert found["kept"] == 256 and len(embedded(found["rows"])) < 240_000
    assert all(len(row["response"]) < 700 for row in found["rows"])


def test_fields_of_another_type_are_left_out(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=1, prompts=0)
    row = {"step": 1, "split": "train", "set": "", "chosen": "best", "prompt_id": 0,
           "prompt": ["no text"], "response": 7, "reward": float("nan"), "parts": {"a": "b"},
           "token_texts": ["a", 3], "logprobs": ["x", -0.12345], "advantage": 10**400,
           "entropies": 9, "new_field": 1}  # fmt: skip
    (run_dir / "samples.jsonl.gz").write_bytes(member([row]))
    (shown,) = samples_of(read_run(run_dir))["rows"]
    assert shown == {
        "step": 1, "split": "train", "set": "", "chosen": "best", "prompt_id": 0, "prompt": "",
        "response": "", "parts": {"a": "b"}, "token_texts": ["a", "3"],
        "logprobs": [None, -0.123],
    }  # fmt: skip


def test_columns_have_three_digits():
    values = [-0.123456, -1.5, 0.0, -3.00049e-06, 2.0]
    assert numbers(values) == [-0.123, -1.5, 0, -3e-06, 2]
    assert numbers([0.0, 0.0]) == [0, 0] and numbers([]) == []
    assert numbers([float("inf"), 1.23456]) == [None, 1.23]
    assert numbers([None, 1, True]) == [None, 1, None]
    assert numbers([1e-40, 12345.6]) == [1e-40, 12300]


def test_steps_without_a_choice_show_their_best_worst_and_typical_group(tmp_path):
    """log.samples=-1 keeps all groups as `all`."""
    run_dir = make_run(tmp_path / "run", steps=1, prompts=0)
    rows = [{"step": 1, "split": "train", "set": "", "chosen": "all", "prompt_id": prompt,
             "sample_id": 0, "prompt": '"reward": 9', "response": "x" * 400,
             "reward": prompt / 10} for prompt in range(9)]  # fmt: skip
    (run_dir / "samples.jsonl.gz").write_bytes(member(rows))
    found = samples_of(read_run(run_dir), budget=2400)["rows"]
    assert sorted(row["prompt_id"] for row in found) == [0, 4, 8]


def test_a_page_of_a_thousand_steps_with_long_responses_is_under_5_mb(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=1000, tokens=3, prompts=0, metrics=30)
    made = make_run(tmp_path / "one", steps=1, tokens=2000, prompts=2, group=4)
    content = gzip.decompress((made / "samples.jsonl.gz").read_bytes())
    rows = [row for row in map(json.loads, content.splitlines()) if row["split"] == "train"]
    assert len(rows) == 8
    with open(run_dir / "samples.jsonl.gz", "wb") as file:
        for step in range(100, 1001, 100):
            file.write(member([row | {"step": step} for row in rows]))
    text = page(report_data([run_dir, run_dir]))
    assert 2_000_000 < len(text.encode()) < LARGEST


def test_what_is_remembered_of_a_live_run_is_bounded():
    """The group that was asked for longest ago is forgotten first; one too large is not kept."""
    known, keys = Known(100), [(1, (step, "train", "", 0, 0), 9) for step in range(4)]
    groups = [Shown([], cost, [{}], [10]) for cost in (30, 30, 30, 200)]
    for key, group in zip(keys[:2], groups[:2], strict=True):
        known.put(key, group)
    known.put(keys[0], groups[0])
    known.put(keys[2], groups[2])
    assert [known.get(key) for key in keys[:3]] == [groups[0], None, groups[2]]
    known.put(keys[3], groups[3])
    assert [known.get(key) for key in keys] == [None] * 4
    known.put(keys[1], groups[1])
    assert known.get(keys[1]) is groups[1]
