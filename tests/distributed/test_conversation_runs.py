"""Conversations in real runs: the same bits in every layout, at any pace, and after a resume.

About 50 s on two ranks.
"""

from __future__ import annotations

import json

import pytest
from launching import Run, launch, runs

TASK = ["task=talking_tasks:Chatty", "task_args.min_length=3", "task_args.max_length=4"]
SMALL = [
    "conf=qwen3_tiny", *TASK, "model.max_length=64", "num_prompts=8", "group_size=4", "steps=2",
    "eval.every=0", "eval.num_prompts=8", "eval.num_samples=2", "log.tensorboard=false",
    "log.samples=-1", "batch_invariant=true",
]  # fmt: skip
SPLIT_TP = ["generator.tp=2", "trainer.dp_shard=2", "reward.workers=2", "task_args.seconds=0.01"]


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> dict[str, Run]:
    """A run with the replies of its own process; one in another layout, with slow replies of two
    processes and a small cache; one that stops after a step and is resumed.
    """
    root = tmp_path_factory.mktemp("talks")
    tight = ["generator.kv_tokens=64", "generator.prefix_cache=false"]
    resumed = root / "stopped" / "run"
    asked = {
        "plain": ("grpo", [*SMALL, "check=strict", "reward.workers=0"]),
        "others": ("grpo", [*SMALL, "check=strict", *SPLIT_TP, *tight]),
        "stopped": ("grpo", [*SMALL, "reward.workers=0", "steps=1", "checkpoint.every=1"]),
        "resumed": ("grpo", [f"resume={resumed}", "steps=2"]),
        "replayed": ("replay", [str(resumed), "step=2"]),
        "controls": ("grpo", [*SMALL, "task=talking_tasks:Controls", "reward.workers=0"]),
    }
    return runs(root, 2, asked) | {"resumed": Run(resumed, "")}


def test_a_rollout_has_the_same_bits_in_every_layout_and_at_any_pace(talks):
    first = [[s for s in talks[name].samples if s["step"] == 1] for name in ("plain", "others")]
    plain, others = (sorted(map(json.dumps, samples)) for samples in first)
    assert plain == others and len(plain) == 8 * 4
    for name in ("plain", "others"):
        metrics = talks[name].metrics[1]
        assert metrics["logprob_diff/max"] == 0 and metrics["ratio/max"] == 1
        assert metrics["turns/max"] == 3 and metrics["tokens/replied"] > 0
        assert metrics["finish/stop"] + metrics["finish/length"] == 1


def test_samples_show_turns_of_both_sides(talks):
    for sample in talks["plain"].samples:
        turns = sample["turns"]
        assert [turn["sampled"] for turn in turns] == [i % 2 == 0 for i in range(len(turns))]
        assert sample["response"] == turns[-1]["text"]
        assert all(turn["text"].endswith(">") for turn in turns[1::2])
        assert sample["parts"] == {"said": (len(turns) + 1) / 2}


def test_a_resumed_run_has_the_conversations_of_one_that_did_not_stop(talks):
    plain, resumed = talks["plain"], talks["resumed"]
    assert plain.samples == resumed.samples
    digests = [run.metrics[-1]["digest/weights"] for run in (plain, resumed)]
    assert digests[0] == digests[1] and resumed.metrics[-1]["step"] == 2


def test_a_step_of_conversations_is_replayed_to_the_bit(talks):
    assert "equal to the bit" in talks["replayed"].output


def test_a_control_token_in_a_reply_is_said_once_by_one_rank(talks):
    """The prompts with odd numbers are rank 1's."""
    talked = talks["controls"]
    warning = (
        "warning: the reply 'a<eos>' has the control token '<eos>', which ends a turn: the model "
        "does not read it as text; take it out of what reply returns, unless it is there on purpose"
    )
    assert talked.output.count(warning) == 1 and talked.metrics[-1]["step"] == 2
    other = (talked.path.parent / "output-1.txt").read_text()
    assert "control token" not in other
    assert not any("control token" in talks[name].output for name in ("plain", "others"))


def test_generate_shows_replies_in_brackets():
    words = ["conf=qwen3_tiny", *TASK, "model.max_length=64", "generate.prompts=[abc>]"]
    output = launch("recipes/generate.py", 1, *words).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("abc> -> ")]
    assert line.count("[") == 2 and line.count(">]") == 2
    assert (
        "replies to what is generated, and 1 of 1 prompts have neither an answer nor in" in output
    )


def test_generate_gives_a_reply_the_answer_and_info_of_a_file(tmp_path):
    rows = [{"prompt": "3-60:", "answer": "45", "info": {"low": 3, "high": 60}}]
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["conf=qwen3_tiny", "task=guess", "model.max_length=128", f"generate.file={file}"]
    output = launch("recipes/generate.py", 1, *words).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("3-60: -> ")]
    assert line.count("[ guess one number ]") >= 3 and "replies to" not in output
