"""Dynamic sampling and pass rates in whole runs: killed and resumed, replayed, in other layouts,
with conversations, and where no group is of use.

About 60 s on two ranks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest
from foreground import Foreground
from launching import Run, launch, runs

from mesh.runs.compare import compare_runs
from mesh.tasks.difficulty import Bounds, PassRates, name_of

SIZE, GROUP = 8, 4
SMALL = [
    "conf=qwen3_tiny", f"num_prompts={SIZE}", f"group_size={GROUP}", "refill_rounds=3",
    "batch_invariant=true", "eval.every=0", "eval.num_prompts=4", "eval.num_samples=1",
    "log.tensorboard=false", "log.samples=-1",
]  # fmt: skip
BOUNDS = ["difficulty.max=0.6", "difficulty.forget=9", "task=dataset", "task_args.judge=exact"]


def data_set(root: Path) -> list[str]:
    """Keys of a run on 42 words, of which a step of 8 has seen most after a few steps."""
    path = root / "words.jsonl"
    words = [f"{a}{b}c" for a in "adgjmpt" for b in "behknq"]
    rows = [{"prompt": f"{word}>", "answer": word[::-1]} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*SMALL, *BOUNDS, f"task_args.path={path}", "task_args.held_out_rows=4"]


def killed(path: Path, words: list[str]) -> None:
    """Start a run and kill -9 a rank of it at a random moment after the first checkpoint."""
    job = Foreground("grpo.py", 2, *words, "steps=1000", "checkpoint.every=2", f"run_dir={path}")
    job.wait_for(lambda: (path / "checkpoints" / "step-4").exists())
    time.sleep(random.uniform(0, 1))
    os.kill(job.ranks()[random.randrange(2)], signal.SIGKILL)
    _, err = job.popen.communicate(timeout=60)
    assert job.popen.returncode != 0, err


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    """A run that was killed and resumed to take two steps more; the same run, never killed; a step
    of it taken again; one with conversations, twice, in other layouts; one of equal rewards.
    """
    root = tmp_path_factory.mktemp("runs")
    path, words = root / "killed", data_set(root)
    killed(path, words)
    steps = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 2
    talk = [
        *SMALL, "task=talking_tasks:Chatty", "model.max_length=64", "check=strict", "steps=2",
        "task_args.min_length=3", "task_args.max_length=4", "reward.workers=0", "refill_on=said",
    ]  # fmt: skip
    asked = {
        "again": ("grpo", [f"resume={path}", f"steps={steps}"]),
        "uninterrupted": ("grpo", [*words, f"steps={steps}"]),
        "replayed": ("replay", [str(path), f"step={steps - 1}"]),
        "talk": ("grpo", talk),
        "talk again": ("grpo", [*talk, "steps=1", "generator.tp=2", "trainer.tp=2"]),
        "equal": ("grpo", [*SMALL, "task=user_tasks:Flat", "steps=2"]),
    }
    return runs(root, 2, asked) | {"killed": Run(path, "")}


def test_killed_and_resumed_is_the_run_that_was_never_killed(made):
    """Every line of both logs, and with them every prompt of every round."""
    compared = compare_runs(made["killed"].path, made["uninterrupted"].path)
    assert compared.first is None
    assert compared.samples == len(made["killed"].kept)
    assert len(made["killed"].samples) > SIZE * GROUP * (compared.steps - 1)
    assert "equal to the bit" in made["replayed"].output


def test_a_step_says_how_many_prompts_it_took(made):
    for line in made["uninterrupted"].metrics[1:]:
        mine = [s for s in made["uninterrupted"].samples if s["step"] == line["step"]]
        groups = defaultdict(list)
        for sample in mine:
            groups[sample["prompt_id"]].append(sample)
        assert line["prompts/drawn"] == len(groups) and line["prompts/rounds"] <= 3
        assert {place // SIZE for place in groups} == set(range(int(line["prompts/rounds"]) + 1))
        unequal = [
            place for place, g in sorted(groups.items()) if len({s["reward"] for s in g}) > 1
        ]
        kept = [place for place, group in groups.items() if "left_out" not in group[0]]
        assert sorted(kept) == unequal[:SIZE]
        surplus = {p for p, group in groups.items() if group[0].get("left_out") == "surplus"}
        assert surplus == set(unequal[SIZE:])
        counts = [line[f"groups/{name}"] for name in ("kept", "surplus", "missing")]
        assert counts == [len(kept), len(surplus), SIZE - len(kept)]
        assert (line["tokens/trained"] < line["tokens/generated"]) == (len(kept) < len(groups))
    assert max(line["prompts/rounds"] for line in made["uninterrupted"].metrics[1:]) > 0


def test_the_pass_rates_of_the_logs_are_those_by_which_prompts_were_drawn(made):
    """Taken in again from the samples, as a user could: no step has a prompt above the bound, but
    those that it says it has, and some were left out.
    """
    rates, skipped = PassRates(Bounds(0.0, 0.6, 9)), 0.0
    run = made["uninterrupted"]
    for line in run.metrics[1:]:
        step = line["step"] - 1
        groups = defaultdict(list)
        for sample in run.samples:
            if sample["step"] == line["step"]:
                groups[sample["prompt_id"], sample["prompt"]].append(sample["correct"])
        above = [q for _, q in groups if (rates.rate(q, step) or 0.0) > 0.6]
        assert len(above) == line["difficulty/waived"]
        rates.add(step, [(question, sum(said), GROUP) for (_, question), said in groups.items()])
        assert line["difficulty/known"] == len(rates.known)
        skipped += line["difficulty/skipped"]
    assert skipped > 0 and name_of(run.samples[-1]["prompt"]) in rates.known


def test_conversations_are_refilled_by_a_part_of_their_score_in_any_layout(made):
    """`said` counts a sample's turns, which are 3 unless a turn was cut."""
    first = [s for s in made["talk"].samples if s["step"] == 1]
    said = defaultdict(set)
    for sample in first:
        said[sample["prompt_id"]].add(sample["parts"]["said"])
    equal = {place for place, values in said.items() if len(values) == 1}
    assert {s["prompt_id"] for s in first if s.get("left_out") == "equal"} == equal
    line = made["talk"].metrics[1]
    assert line["prompts/drawn"] == len(said) and line["logprob_diff/max"] == 0
    assert made["talk again"].samples == first


def test_a_step_without_a_group_of_use_changes_nothing_and_says_so(made):
    for line in made["equal"].metrics[1:]:
        assert (line["groups/kept"], line["groups/missing"]) == (0, SIZE)
        assert line["prompts/drawn"] == 4 * SIZE and line["prompts/rounds"] == 3
        assert line["tokens/trained"] == 0 and line["grad_norm"] == 0
    digests = {line["digest/weights"] for line in made["equal"].metrics[1:]}
    assert len(digests) == 1
    assert made["equal"].output.count("warning: step 1 trains on 0 of 8 groups") == 1


def test_what_cannot_be_refilled_is_refused_before_a_model_is_built(tmp_path):
    words = [*SMALL, "waves=2", "difficulty.max=0.5", f"run_dir={tmp_path / 'run'}"]
    result = launch("recipes/grpo.py", 2, *words, status=1)
    found = [line for line in result.stderr.splitlines() if line.startswith("- ")]
    assert [line.partition(":")[0] for line in found] == [
        "- difficulty.max=0.5",
        "- refill_rounds=3",
    ]
    assert not (tmp_path / "run").exists()
