"""check=strict: comparing logprobs, merging ranks, the judgement of a replay, the report."""

from __future__ import annotations

import json

import pytest
import torch

from mesh.config.loading import load_conf
from mesh.exactness.comparison import Tally, by_key, compare_rollouts
from mesh.exactness.strict import merge, message, report, to_json
from mesh.exactness.trace import Trace
from mesh.exactness.trainer import scored
from mesh.exactness.verdict import judge
from mesh.layout.meshes import plan_layout
from mesh.program.checks import check_start
from mesh.types import Rollout


def rollout(sample_id: int, logprobs: tuple[float, ...], prompt_id: int = 4) -> Rollout:
    tokens = tuple(range(50, 50 + len(logprobs)))
    return Rollout(prompt_id, sample_id, (1, 2, 3), tokens, logprobs, 0.0, "stop")


def compare(rollouts: list[Rollout], logprobs_A: torch.Tensor) -> Tally:
    """The trainer's logprobs against the generator's, as a strict run compares a wave."""
    return compare_rollouts(scored(rollouts, logprobs_A), by_key(rollouts))


def test_compare_finds_every_bit_and_what_is_not_finite():
    rollouts = [rollout(0, (-1.0, -2.0)), rollout(1, (0.0, -0.5, -3.0))]
    same = torch.tensor([-1.0, -2.0, 0.0, -0.5, -3.0])
    assert compare(rollouts, same) == Tally(5, 0, 0, None)
    moved = same.clone()
    moved[3] = torch.nextafter(moved[3], torch.tensor(0.0))
    found = compare(rollouts, moved)
    assert (found.compared, found.different) == (5, 1) and found.first is not None
    first = found.first
    assert (first.prompt_id, first.sample_id, first.index, first.position) == (4, 1, 1, 4)
    assert (first.token, first.logprobs) == (51, (float(moved[3]), -0.5))
    for value in (torch.nan, -torch.inf):
        bad = [rollout(0, (-1.0, value)), rollouts[1]]
        for sides in ((bad, same), (bad, torch.tensor([-1.0, value, 0.0, -0.5, -3.0]))):
            assert compare(*sides).different == 1, "equal bits that are not finite are no success"
        assert compare(rollouts, torch.where(same == -2, value, same)).different == 1
    assert compare(rollouts, torch.tensor([-1.0, -2.0, -0.0, -0.5, -3.0])).different == 1
    with pytest.raises(RuntimeError, match="sum exactly to 4"):
        compare(rollouts, same[:4])


def test_merge_counts_tensor_parallel_ranks_once():
    first = compare([rollout(2, (-1.0,), prompt_id=7)], torch.tensor([-1.5]))
    second = compare([rollout(0, (-1.0, -1.0), prompt_id=5)], torch.tensor([-1.0, torch.nan]))
    nothing = compare([], torch.zeros(0))
    words = ["conf=qwen3_tiny", "mesh.mode=split", "trainer.dp_shard=2", "trainer.tp=2"]
    layout = plan_layout(load_conf(words)[1], 6)
    assert layout.trainer_ranks == (0, 1, 2, 3)

    def merged_of(*parts: Tally, due: int = 3) -> Tally:
        return merge([(part, due * (rank < 4)) for rank, part in enumerate(parts)], layout)

    merged = merged_of(first, first, second, second, nothing, nothing)
    assert merged == Tally(3, 2, 1, second.first)
    assert second.first is not None and second.first.prompt_id == 5
    same = compare([rollout(2, (-1.5,), prompt_id=7)], torch.tensor([-1.5]))
    one_rank_only = merged_of(same, first, nothing, nothing, nothing, nothing, due=1)
    assert one_rank_only == Tally(1, 0, 0, first.first), "every rank is heard"
    assert merged_of(*[nothing] * 6, due=0) == Tally(0, 0, 0, None)
    with pytest.raises(AssertionError, match="0 tokens were compared, 3 were due"):
        merged_of(*[nothing] * 6)


def traces(value: float) -> tuple[Trace, Trace]:
    """Two traces whose logprob at position 1 is -1, and this value."""
    outputs = [
        {"norm": torch.ones(2, 3), "lm_head": torch.tensor([[-2.0], [x]])} for x in (-1.0, value)
    ]
    return tuple(Trace(o, {"norm": [0, 1], "lm_head": [0, 1]}) for o in outputs)


def test_judgement_of_a_replay_that_finds_no_module():
    verdict = judge(*traces(-1.0))
    assert "does not reproduce" in verdict.text and verdict.module is None
    verdict = judge(*traces(-1.5))
    assert "hidden states are equal up to the logprob function" in verdict.text
    assert (verdict.module, verdict.position) == ("lm_head", 1)
    same = traces(torch.nan)[1]
    verdict = judge(same, same)
    assert "not finite" in verdict.text and (verdict.module, verdict.position) == ("lm_head", 1)


def test_reports_can_say_nan():
    tally, verdict = compare([rollout(0, (-1.0,))], torch.tensor([torch.nan])), judge(*traces(-1.0))
    assert "nan (nan)" in message(3, tally, verdict)
    facts = json.loads(to_json(report(3, tally, verdict)))
    assert (facts["step"], facts["tokens"], facts["differing"]) == (3, 1, 1)
    assert facts["first"]["trainer"] == {"value": "nan", "hex": "nan"}
    assert facts["first"]["generator"] == {"value": "-1.0", "hex": (-1.0).hex()}
    assert [facts["first"][name] for name in ("index", "position", "token")] == [0, 3, 50]
    text = to_json({"x": torch.nan, "y": [0.1, 2], "z": None})
    assert json.loads(text) == {
        "x": {"value": "nan", "hex": "nan"},
        "y": [{"value": "0.1", "hex": (0.1).hex()}, 2],
        "z": None,
    }


def test_strict_without_the_switch_is_refused_with_all_other_problems():
    words = ["conf=qwen3_tiny", "check=strict", "num_prompts=5", "waves=2"]
    with pytest.raises(ValueError, match="2 problems") as refusal:
        check_start(load_conf(words)[1], "cpu", 1, None)
    assert "check=strict: with ordinary kernels" in str(refusal.value)
    assert "batch_invariant=true" in str(refusal.value)
    words = ["conf=qwen3_tiny", "check=strict", "batch_invariant=true"]
    check_start(load_conf(words)[1], "cpu", 1, None)
