"""What runs keep of their rollouts: one choice in every layout, to the bit; the numbers of tokens.

Two launches of one and of two ranks, about 40 s.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from launching import TWO_RANK_LAYOUTS, Run, runs
from test_teacher_runs import moved

from mesh.runs.samples import read_samples

Row = Mapping[str, Any]
SMALL = [
    "conf=qwen3_tiny", "num_prompts=12", "group_size=4", "steps=1", "eval.every=0",
    "eval.num_prompts=9", "eval.num_samples=3", "log.tensorboard=false", "batch_invariant=true",
    "eval.sets.cold.temperature=0.5", "eval.sets.cold.num_prompts=2",
]  # fmt: skip
FEW = [*SMALL, "log.samples=13"]
UPDATES = ["steps=2", "updates_per_step=2", "trainer.warmup_steps=0", "trainer.lr=1e-3"]
TALK = [
    "task=talking_tasks:Chatty", "task_args.min_length=3", "task_args.max_length=4",
    "model.max_length=64", "reward.workers=0",
]  # fmt: skip
COLUMNS = ("logprobs", "logprob_diffs", "entropies")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    root, one = (tmp_path_factory.mktemp(name) for name in ("samples", "one"))
    teacher = moved(root / "teacher", 1)
    distil = ["loss=distill", f"teacher.path={teacher}", "log.samples=-1"]
    dropped = ["drop_equal_groups=true", "refill_rounds=1", "log.samples=-1", "log.tokens=false"]
    asked = {
        "fsdp": ("grpo", FEW),
        **{name: ("grpo", [*FEW, *words]) for name, words in TWO_RANK_LAYOUTS.items()},
        "all": ("grpo", [*SMALL, "log.samples=-1"]),
        "none": ("grpo", [*SMALL, "log.samples=0"]),
        "updates": ("grpo", [*SMALL, *UPDATES, "log.samples=-1"]),
        "distilled": ("grpo", [*SMALL, *distil]),
        "distilled in two": ("grpo", [*SMALL, *distil, *UPDATES]),
        "dropped": ("grpo", [*SMALL, *dropped]),
        "talk": ("grpo", [*FEW, *TALK]),
        "sft": ("sft", [*SMALL, "sft.steps=1", "sft.batch_size=2"]),
    }
    return runs(one, 1, {"one rank": ("grpo", FEW)}) | runs(root, 2, asked)


def rows(run: Run, split: str, step: int | None = None) -> list[Row]:
    found = [row for row in read_samples(run.path) if row["split"] == split]
    return [row for row in found if step is None or row["step"] == step]


def groups(found: list[Row]) -> dict[tuple[str, int], list[Row]]:
    by_group: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        by_group.setdefault((row["set"], row["prompt_id"]), []).append(row)
    return by_group


@pytest.mark.parametrize("name", ["fsdp", *TWO_RANK_LAYOUTS])
def test_every_layout_keeps_the_same_rollouts_to_the_bit(made, name):
    """Of the first step and the first evaluation; the second has weights whose sums have other
    orders."""
    for split, step in (("train", 1), ("eval", 0)):
        mine, one = rows(made[name], split, step), rows(made["one rank"], split, step)
        assert list(map(json.dumps, mine)) == list(map(json.dumps, one)) and mine


def test_whole_groups_the_best_and_the_worst_among_them(made):
    kept, every = rows(made["fsdp"], "train"), rows(made["all"], "train")
    assert len(every) == 48 and {row["chosen"] for row in every} == {"all"}
    means = {key: sum(r["reward"] for r in group) / 4 for key, group in groups(every).items()}
    by_why = {group[0]["chosen"]: key for key, group in groups(kept).items()}
    assert by_why.keys() == {"best", "worst", "random"} and len(kept) == 12
    assert means[by_why["best"]] == max(means.values())
    assert means[by_why["worst"]] == min(means.values())
    full = {(row["prompt_id"], row["sample_id"]): row for row in every}
    for row in kept:
        twin = full[row["prompt_id"], row["sample_id"]]
        assert row == twin | {"chosen": row["chosen"]}
    assert [row["sample_id"] for row in kept] == [0, 1, 2, 3] * 3
    assert read_samples(made["none"].path) == []
    assert made["none"].metrics[-1]["digest/weights"] == made["all"].metrics[-1]["digest/weights"]


def test_the_same_held_out_prompts_are_answered_every_time(made):
    """Of 13 // 3 prompts of the run's own set, three samples and the greedy answer."""
    first, last = rows(made["fsdp"], "eval", 0), rows(made["fsdp"], "eval", 1)
    names = [[(r["set"], r["prompt_id"], r["sample_id"]) for r in part] for part in (first, last)]
    assert names[0] == names[1]
    counts = Counter(row["set"] for row in first)
    assert counts == {"": 4 * 4, "cold": 2 * 4}
    assert {row["chosen"] for row in first} == {"fixed"}
    assert [row["sample_id"] for row in first[:4]] == [-1, 0, 1, 2]
    assert not any("advantage" in row or "entropies" in row for row in first)
    assert all(len(row["logprobs"]) == row["length"] for row in first)
    own = [row for row in rows(made["all"], "eval", 0) if row["set"] == ""]
    sampled = [row["correct"] for row in own if row["sample_id"] >= 0]
    assert len(own) == 36
    assert sum(sampled) / 27 == pytest.approx(made["all"].metrics[0]["eval/accuracy"])
    greedy = [row["correct"] for row in own if row["sample_id"] < 0]
    assert sum(greedy) / 9 == pytest.approx(made["all"].metrics[0]["eval/accuracy_greedy"])
    assert {row["step"] for row in rows(made["sft"], "eval")} == {0, 1}
    assert rows(made["sft"], "train") == []


def mean(found: list[Row], name: str) -> float:
    numbers = [x for row in found for x in row[name]]
    return math.fsum(numbers) / len(numbers)


@pytest.mark.parametrize("name", ["all", "updates", "talk"])
def test_numbers_are_of_the_tokens_that_were_sampled(made, name):
    for step in range(1, len(made[name].metrics)):
        found, metrics = rows(made[name], "train", step), made[name].metrics[step]
        for row in found:
            assert all(len(row[column]) == row["length"] for column in COLUMNS)
            assert len(row["token_texts"]) == len(row["tokens"])
            assert set(row["logprob_diffs"]) == {0.0}
            assert max(row["logprobs"]) <= 0 and min(row["entropies"]) >= 0
            assert "token_advantages" not in row
        if name == "all":
            assert mean(found, "entropies") == pytest.approx(metrics["entropy"], abs=1e-4)


def test_turns_are_cut_in_tokens(made):
    for row in rows(made["talk"], "train") + rows(made["talk"], "eval"):
        sampled = [turn["num_tokens"] for turn in row["turns"] if turn["sampled"]]
        assert sum(sampled) == row["length"] == len(row["logprobs"])
        place = 0
        for turn in row["turns"]:
            texts = row["token_texts"][place : place + turn["num_tokens"]]
            assert turn["text"] == "".join(texts).removesuffix("<eos>")
            place += turn["num_tokens"]
        assert place == len(row["tokens"])


@pytest.mark.parametrize("name", ["distilled", "distilled in two"])
def test_tokens_that_are_credited_one_by_one_have_their_advantages(made, name):
    """Of a distillation they are the teacher's logprob minus the policy's, whose mean is the metric
    with the other sign; in a later update the policy has moved."""
    for step in range(1, len(made[name].metrics)):
        found = rows(made[name], "train", step)
        assert all(len(row["token_advantages"]) == row["length"] for row in found)
        kl = made[name].metrics[step]["teacher_kl"]
        assert -mean(found, "token_advantages") == pytest.approx(kl, abs=1e-5) and kl > 0.01


def test_what_was_not_trained_on_has_no_numbers_of_the_trainer(made):
    found = rows(made["dropped"], "train")
    reasons = {row.get("left_out") for row in found}
    assert reasons >= {None, "equal"} and len(found) > 48
    assert all(row["advantage"] == 0 for row in found if "left_out" in row)
    assert not any("tokens" in row or "token_texts" in row or "logprobs" in row for row in found)
    assert all(row["prompt_text"] == row["prompt"] for row in found)


def test_datasets_loads_runs_with_and_without_conversations(made, tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("fsdp", "talk"):
        file = str(made[name].path / "samples.jsonl.gz")
        found = datasets.load_dataset(
            "json", data_files=file, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert {"prompt", "response", "reward", "token_texts", "chosen"} <= set(found.column_names)
        assert found[0]["token_texts"] and len(found) > 20
