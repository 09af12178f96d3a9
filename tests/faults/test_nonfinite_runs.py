"""Values that are not finite in launched runs: the end of the run, a skipped step, two ranks.

The trainer of one rank: unit/test_nonfinite.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import launch


def sequence(prompt_id: int, sample_id: int, position: int, what: str, value: str, *counts: int):
    ids = {"prompt_id": prompt_id, "sample_id": sample_id, "position": position}
    return ids | {"what": what, "value": value, "tokens": counts[0], "length": counts[1]}


# A task whose import breaks the engine: in the third step one logprob of one answer is infinite.
# The ranks score by themselves, as a process that scores would import the engine, and torch, too.
BROKEN = """
from dataclasses import dataclass, replace

from mesh.engine.native.engine import NativeEngine
from mesh.tasks.spell_backward import SpellBackward

whole = NativeEngine.generate


def generate(self, requests, sampling):
    return [
        replace(c, logprobs=(float("inf"), *c.logprobs[1:]))
        if (sampling.step, c.prompt_id, c.sample_id) == (2, 5, 2) and sampling.temperature else c
        for c in whole(self, requests, sampling)
    ]


NativeEngine.generate = generate


@dataclass(frozen=True)
class Task(SpellBackward):
    pass
"""
WORDS = [
    "conf=qwen3_tiny", "mesh.mode=split", "num_prompts=8", "group_size=4", "waves=2", "steps=4",
    "eval.every=0", "eval.num_prompts=8", "eval.num_samples=1", "log.tensorboard=false",
    "checkpoint.every=1", "checkpoint.keep=9", "task=broken:Task",
    "reward.workers=0",
]  # fmt: skip
KEYS = {"WANDB_API_KEY": "4d61726b65724f6e65" * 2, "netrc": "4d61726b657254776f" * 2}


@dataclass(frozen=True)
class Stopped:
    """A run on split meshes that ended in its third step and was resumed to skip it, by a user
    who has keys of W&B in the environment and in ~/.netrc."""

    path: Path
    stderr: str
    checkpoints: set[str]
    found: list[dict]
    resumed: str
    outputs: list[str]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Stopped:
    path = tmp_path_factory.mktemp("stopped")
    (path / "broken.py").write_text(BROKEN)
    home = path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {KEYS['netrc']}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("WANDB_API_KEY", KEYS["WANDB_API_KEY"])
        words = [*WORDS, f"run_dir={path / 'run'}"]
        first = launch("recipes/grpo.py", 2, *words, status=1, path=path)
        checkpoints = {item.name for item in (path / "run" / "checkpoints").glob("step-*")}
        found = lines_of(path / "run" / "nonfinite.jsonl")
        words = [f"resume={path / 'run'}", "on_nonfinite=skip"]
        second = launch("recipes/grpo.py", 2, *words, path=path)
    outputs = [text for made in (first, second) for text in (made.stdout, made.stderr)]
    return Stopped(path / "run", first.stderr, checkpoints, found, second.stdout, outputs)


def test_a_run_that_stops_says_where_and_keeps_the_checkpoint_before(stopped):
    assert "rank 0 failed at" in stopped.stderr
    words = "prompt_id=5 sample_id=2 position 0 of the response: generator logprob inf (1 of "
    assert "on_nonfinite=stop: step 3 is not finite (loss " in stopped.stderr
    assert words in stopped.stderr and words in (stopped.path / "error-rank0.txt").read_text()
    assert "step-1" in stopped.checkpoints
    assert not any(name.startswith("step-3") for name in stopped.checkpoints)
    (line,) = stopped.found
    assert (line["step"], line["action"]) == (3, "stop")
    (found,) = line["sequences"]["first"]
    assert (found["prompt_id"], found["sample_id"], found["what"]) == (5, 2, "generator logprob")


def test_it_continues_without_that_step_when_told_to_skip(stopped):
    """Both roles stay in step: the next one is trained on and logged. JSON has no infinities."""
    assert "skipped: step 3 is not finite (loss " in stopped.resumed
    assert "done  4/4 steps" in stopped.resumed
    metrics = lines_of(stopped.path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert [line["skipped"] for line in metrics[3:]] == [1.0, 0.0]
    assert metrics[3]["logprob_diff/max"] is None and metrics[4]["logprob_diff/max"] < 1e-4
    weights = [line.get("digest/weights") for line in metrics]
    assert weights[1] != weights[2] == weights[3] != weights[4]
    index = json.loads((stopped.path / "checkpoints" / "step-4" / "index.json").read_text())
    assert (index["content"]["step"], index["content"]["updates"]) == (4, 3)
    (line,) = lines_of(stopped.path / "nonfinite.jsonl")
    assert (line["step"], line["action"]) == (3, "skip")


def test_keys_of_wandb_reach_no_file_and_no_output(stopped):
    files = [path for path in stopped.path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {
        "config.yaml", "environment.json", "environment-2.json", "metrics.jsonl",
        "samples.jsonl.gz", "error-rank0.txt", "nonfinite.jsonl", "index.json",
    }  # fmt: skip
    for key in KEYS.values():
        assert not [path for path in files if key.encode() in path.read_bytes()]
        assert not any(key in output for output in stopped.outputs)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[list[dict], dict[str, list[dict]]]:
    """What two ranks saw by layout, and the lines that were written there."""
    path = tmp_path_factory.mktemp("two_ranks")
    launch("tests/programs/nonfinite_program.py", 1, str(path))
    seen = [torch.load(path / f"{rank}.pt") for rank in range(2)]
    return seen, {name: lines_of(path / name / "nonfinite.jsonl") for name in seen[0]}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_ranks_agree_whichever_of_them_has_the_fault(two_ranks):
    """Shards, replicas and tensor-parallel copies, of which the norm counts only the first."""
    seen, _ = two_ranks
    assert list(seen[0]) == ["shard", "replicate", "tp"]
    for layout, mine in seen[0].items():
        assert seen[1][layout] == mine
        assert all(mine[fault] == (1.0, True) for fault in ("rollout", "gradient", "weight"))
        assert mine["sound"] == (0.0, False) and mine["counts"] == (7, 3)
        text, unchanged = mine["stop"]
        assert text.startswith("on_nonfinite=stop: step 8 is not finite (loss ") and unchanged
        assert "layers.1.attention_norm.weight: 1 of 128 elements" in text


def test_a_gradient_of_one_rank_is_a_signal_for_all_and_none_is_for_none(two_ranks):
    """One prompt has advantages, then none; of two data-parallel ranks, one trains on it."""
    seen, _ = two_ranks
    for layout, mine in seen[0].items():
        assert (mine["lonely"], mine["equal"]) == ((0.0, False), (1.0, True)), layout
        assert seen[1][layout]["lonely"] == mine["lonely"]
        assert seen[1][layout]["equal"] == mine["equal"]


def test_what_the_ranks_found_is_put_together(two_ranks):
    _, lines = two_ranks
    name = "layers.1.attention_norm.weight"
    for layout, found in lines.items():
        assert [(line["step"], line["action"]) for line in found] == [
            (2, "skip"), (3, "skip"), (4, "skip"), (8, "stop"),
        ]  # fmt: skip
        rollout, gradient, weight, stop = found
        first = sequence(3, 1, 4, "generator logprob", "inf", 1, 7)
        assert rollout["sequences"] == {"count": 1, "first": [first]}
        once = {"count": 1, "first": [{"name": name, "elements": 1, "total": 128}]}
        assert gradient["gradients"] == stop["gradients"] == once
        assert gradient["sequences"]["count"] == 0
        assert weight["weights"] == once
        # of replicas one has the NaN: the sequences that it trains on
        reached = [1, 3] if layout == "replicate" else [0, 1, 2, 3]
        ids = {(found["prompt_id"], found["sample_id"]) for found in weight["sequences"]["first"]}
        assert ids == {(p, s) for p in reached for s in range(2)}
