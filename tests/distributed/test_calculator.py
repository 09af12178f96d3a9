"""The calculator from a warm start: recipes/sft.py teaches conversations, recipes/grpo.py goes on.

What it learns in minutes is a documented command (docs/conversations.md); this takes about 30 s.
"""

from __future__ import annotations

import re

import pytest
from launching import Run, runs

from mesh.tasks.calculator import END, ERROR, result

WORDS = ["conf=calculator_tiny", "task_args.digits=1", "eval.num_prompts=16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("calculator")
    warm = [*WORDS, "model.init=random", "sft.steps=60", "sft.batch_size=64"]
    model = f"model.path={root / 'sft' / 'run' / 'model'}"
    exact = ["batch_invariant=true", "check=strict"]
    few = ["steps=2", "num_prompts=8", "group_size=4", "log.samples=-1"]
    return runs(root, 2, {"sft": ("sft", warm), "grpo": ("grpo", [*WORDS, model, *few, *exact])})


def test_conversations_are_taught_from_random_weights(made):
    before, *_, after = made["sft"].metrics
    assert before["step"] == 0 and before["eval/accuracy"] < 0.2
    assert after["loss"] < 0.5 < made["sft"].metrics[1]["loss"] / 5
    assert after["eval/accuracy"] > before["eval/accuracy"]
    assert before["eval/reward/used"] < 0.05 and after["eval/reward/used"] > 0.3


def test_the_model_uses_the_tool_and_each_call_has_its_result(made):
    samples = made["grpo"].samples
    assert len(samples) == 2 * 8 * 4
    talks = [sample["turns"] for sample in samples if len(sample.get("turns", [])) > 1]
    assert len(talks) > len(samples) * 0.3
    for turns in talks:
        assert [turn["sampled"] for turn in turns] == [i % 2 == 0 for i in range(len(turns))]
        for call, reply in zip(turns[::2], turns[1::2], strict=False):
            assert reply["text"] == result(call["text"])


def test_rewards_parts_and_trained_tokens_are_those_of_the_samples(made):
    for line in made["grpo"].metrics[1:]:
        samples = [s for s in made["grpo"].samples if s["step"] == line["step"]]
        used = [any(r["text"] != ERROR for r in turns_of(s) if not r["sampled"]) for s in samples]
        assert line["reward/used"] == pytest.approx(sum(used) / len(used))
        right = [bool(re.fullmatch(r"(.*\D)?" + s["answer"], s["response"])) for s in samples]
        rewards = [s["reward"] for s in samples]
        assert rewards == [
            float(r and result(s["response"]) is None) for r, s in zip(right, samples, strict=True)
        ]
        assert line["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert line["tokens/trained"] == sum(map(sampled_tokens, samples))
        assert line["logprob_diff/max"] == 0


def turns_of(sample: dict) -> list[dict]:
    return sample.get("turns") or [{"text": sample["response"], "sampled": True}]


def sampled_tokens(sample: dict) -> int:
    """Tokens that the policy sampled: characters, and the end token where one ended its turn."""
    texts = [turn["text"].replace("<pad>", "p") for turn in turns_of(sample) if turn["sampled"]]
    ended = sample["finish_reason"] == "stop" and not texts[-1].endswith(END)
    return sum(map(len, texts)) + ended + sum(not text.endswith(END) for text in texts[:-1])
