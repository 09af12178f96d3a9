"""What real runs write of their time: who waited for whom, and profiles, which change no bit.

Three runs of three small steps on two ranks, about 25 s. A response is scored in 0.1 s: the trainer
of split meshes waits for the generator, 0.4 s for each of a step's two waves.
"""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import pytest
from launching import Run, runs

from mesh.lifecycle.timers import PHASES
from mesh.runs.compare import compare_runs
from mesh.runs.trace_table import phase_times, table_of

WORDS = [
    "conf=qwen3_tiny", "num_prompts=4", "group_size=2", "waves=2", "steps=3", "eval.num_prompts=2",
    "eval.num_samples=1", "eval.every=2", "checkpoint.every=2", "log.tensorboard=false",
    "scores=[user_tasks:slowly]", "reward.workers=1",
]  # fmt: skip
SPLIT = [*WORDS, "mesh.mode=split"]
ASKED = {
    "split": [*SPLIT, "profile.steps=[2]"],
    "plain": [*SPLIT, "log.timeline=false"],
    "colocated": [*WORDS, "trainer.tp=2", "trainer.dp_shard=1", "profile.steps=[2,3]",
                  "profile.rank=1"],
}  # fmt: skip
WAVE = ["generate", "exchange", "train"]
STEP = [*WAVE * 2, "exchange", "train", "sync"]  # the second exchange flushes
EVENTS = {
    0: ["eval"],
    1: ["checkpoint", *STEP],
    2: ["log", "checkpoint", *STEP, "eval"],
    3: ["log", "checkpoint", *STEP, "eval"],
}
SLOW = 0.35  # s of a wave's scores, of 0.4


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    asked = {name: ("grpo", words) for name, words in ASKED.items()}
    return runs(tmp_path_factory.mktemp("timeline"), 2, asked)


def timeline(run: Run) -> list[dict[str, Any]]:
    lines = (run.path / "timeline.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["split", "colocated"])
def test_every_phase_of_every_rank_is_there_and_adds_up_to_the_metrics(made, name):
    lines, metrics = timeline(made[name]), made[name].metrics
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line, logged in zip(lines, metrics, strict=True):
        longest: dict[str, float] = {}
        for number, rank in enumerate(line["ranks"]):
            assert rank["rank"] == number
            assert [event[0] for event in rank["events"]] == EVENTS[line["step"]]
            ends = [0.0]
            for _, begin, end, wait in rank["events"]:
                assert ends[-1] <= begin <= end and 0 <= wait <= end - begin + 1e-4
                ends.append(end)
            for phase in dict.fromkeys(EVENTS[line["step"]]):
                spans = [end - begin for other, begin, end, _ in rank["events"] if other == phase]
                longest[phase] = max(longest.get(phase, 0.0), math.fsum(spans))
        for phase, seconds in longest.items():
            assert logged[f"seconds/{phase}"] == pytest.approx(seconds, abs=1e-3)
    roles = [rank["role"] for rank in lines[1]["ranks"]]
    assert roles == {"split": ["trainer", "generator"], "colocated": ["both", "both"]}[name]


def test_the_trainer_waits_for_the_generators_waves_and_the_generator_for_the_sync(made):
    for line in timeline(made["split"])[1:]:
        trainer, generator = (rank["events"] for rank in line["ranks"])
        (first, second, _), made_by = ([e for e in side if e[0] == "exchange"] for side in
                                       (trainer, generator))  # fmt: skip
        for mine, theirs in ((first, made_by[0]), (second, made_by[1])):
            assert mine[3] == pytest.approx(max(theirs[1] - mine[1], 0), abs=2e-4)
        assert first[3] > SLOW
        assert first[2] - first[1] - first[3] < SLOW  # what came was taken
        ready, waited = (side[-2 if side[-1][0] == "eval" else -1] for side in (trainer, generator))
        assert ready[0] == waited[0] == "sync" and ready[3] == 0
        assert waited[3] == pytest.approx(ready[1] - waited[1], abs=2e-4)


def test_memory_and_the_bytes_of_a_sync(made):
    """On a CPU the peak is not known. Colocated, all weights that tp cuts are put together."""
    for run in made.values():
        for line in run.metrics[1:]:
            assert 0.1 < line["host_gb"] < 10 and "mfu/train" not in line
            assert 0 < line["sync/gb"] < 0.01
            assert line["sync/gb"] / line["seconds/sync"] <= line["sync/gb_per_second"] < 100


def test_neither_the_timeline_nor_a_profile_changes_a_bit(made):
    assert compare_runs(made["split"].path, made["plain"].path).first is None
    assert not (made["plain"].path / "timeline.jsonl").exists()
    assert not (made["plain"].path / "profiles").exists()


@pytest.mark.parametrize(("name", "rank", "steps"), [("split", 0, [2]), ("colocated", 1, [2, 3])])
def test_a_profile_has_all_phases_and_the_operators_forward_and_backward(made, name, rank, steps):
    folder = made[name].path / "profiles"
    names = [f"step-{step}-rank-{rank}" for step in steps]
    found = sorted(path.name for path in folder.iterdir())
    assert found == [f"{one}.{end}" for one in names for end in ("json.gz", "txt")]
    for one in names:
        trace = json.loads(gzip.decompress((folder / f"{one}.json.gz").read_bytes()))
        events = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
        phases = [e["name"] for e in sorted(events, key=lambda e: e["ts"])]
        assert [p for p in phases if p in EVENTS[3]] == [*STEP, "eval", "log", "checkpoint"]
        times, text = phase_times(trace["traceEvents"], PHASES), (folder / f"{one}.txt").read_text()
        assert times["train"].cpu.keys() >= {"aten::mm", "SiluBackward0"}
        assert text == table_of(text.splitlines()[0], times) and one in text.splitlines()[0]
        assert (
            f"profile {folder / one}.json.gz, and a table, {one}.txt, beside it"
            in made[name].output
        )
