"""The validation's parts: comparing bits, the verdict, the layouts and batches that it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.exactness.comparison import Mismatch, Tally, compare_rollouts, compare_values
from mesh.exactness.layouts import candidates, own_layout
from mesh.exactness.table import Check, line, passed, verdict, with_control
from mesh.exactness.walk import mixed_requests, part_of
from mesh.model.families import TINY
from mesh.program.assembly import check
from mesh.types import Rollout

SMALL = [
    "conf=qwen3_tiny", "num_prompts=8", "group_size=4", "model.max_length=64",
    "generator.max_new_tokens=8", "validate.sequences=33", "validate.steps=2",
    "log.tensorboard=false",
]  # fmt: skip
SEQUENCES, TOKENS = 33, 8
NAN = float("nan")


def conf_of(*words: str) -> Conf:
    return load_conf([*SMALL, *words])[1]


def rollout(tokens: tuple[int, ...], logprobs: tuple[float, ...]) -> Rollout:
    return Rollout(3, 1, (5, 6), tokens, logprobs, 0.0, "length")


def compared(got: Rollout, expected: Rollout) -> Tally:
    return compare_rollouts({(3, 1): got}, {(3, 1): expected}, step=4)


def test_comparing_counts_every_token_and_finds_the_first_that_differs():
    base = rollout((7, 8, 9), (-1.0, -0.0, -2.0))
    assert compared(base, base) == Tally(3, 0, 0, None)
    other = compared(rollout((7, 8, 9), (-1.0, 0.0, -2.0)), base)
    assert (other.compared, other.different, other.not_finite) == (3, 1, 0)
    assert other.first is not None and other.first.key == (3, 1)
    assert (other.first.step, other.first.position) == (4, 3)
    assert "0x0.0p+0" in other.first.values[0] and "-0x0.0p+0" in other.first.values[1]
    assert compared(rollout((7, 1, 9), base.logprobs), base).different == 1
    assert compared(rollout((7,), (-1.0,)), base).different == 2
    assert compared(base, rollout((7,), (-1.0,))).first.values[1] == "the end"


def test_what_is_not_finite_fails_also_where_both_sides_have_it():
    nan = rollout((7, 8), (-1.0, NAN))
    tally = compared(nan, nan)
    assert (tally.different, tally.not_finite, tally.passed) == (1, 2, False)
    assert tally.first is not None and tally.first.position == 3
    both = compare_values({"loss": NAN}, {"loss": NAN})
    assert (both.different, both.not_finite, both.passed) == (1, 2, False)
    assert compare_values({"loss": 0.0}, {"loss": -0.0}).different == 1
    assert compare_values({"digest": "ab"}, {"digest": "ab"}).passed


def test_nothing_compared_is_a_failure_unless_it_was_not_run():
    nothing, skipped = Check("L1", "nothing"), Check("L3", "layouts", not_run="one rank")
    assert (nothing.result, skipped.result) == ("FAIL", "not run")
    assert not passed([nothing]) and passed([skipped])
    assert "nothing was compared" in line(nothing) and "(one rank)" in line(skipped)
    good = Check("L1", "good", Tally(5))
    assert verdict([good, nothing, skipped]) == (
        "5 comparisons: no rung of the exactness ladder holds here; L1 FAILED"
    )
    place = Mismatch(
        "token", ("1", "2"), step=0, prompt_id=3, sample_id=1, index=7, position=9, token=5, rank=0,
        module="layers.0.attention.wo", module_position=7,
    )  # fmt: skip
    bad = Check("L2", "loop", Tally(5, 2, 0, place))
    named = "first divergent module layers.0.attention.wo at position 7, step 0, prompt 3, sample 1"
    assert "2 differ" in line(bad) and named in line(bad)
    control = [replace(good, tally=Tally(5, 4, 0, place)), skipped]
    assert [c.differ_without for c in with_control([good, bad, skipped], control)] == [
        4,
        None,
        None,
    ]


def test_candidates_are_every_layout_that_fits():
    everything = candidates(conf_of("validate.layouts=all"), "cpu", 4, TINY)
    cover = candidates(conf_of(), "cpu", 4, TINY)
    assert len(set(everything)) == len(everything) == 9 * 3 + 1 * 1 + 4 * 2 + 2 * 1
    assert set(cover) < set(everything) and len(cover) == 9 + 1 + 4 + 2
    for role in ("trainer", "generator"):
        roles = [{(c.mode, getattr(c, role)) for c in found} for found in (everything, cover)]
        assert roles[0] == roles[1]
    fewer = candidates(conf_of("validate.layouts=all"), "cpu", 4, replace(TINY, vocab_size=130))
    assert {c.trainer.tp for c in fewer} == {c.generator.tp for c in fewer} == {1, 2}
    shared = candidates(conf_of("validate.layouts=all"), "cpu", 4, replace(TINY, num_kv_heads=1))
    assert shared == everything
    conf = conf_of("validate.layouts=own", "mesh.mode=split", "generator.tp=2")
    assert candidates(conf, "cpu", 4, TINY) == [own_layout(conf, 4)]
    assert str(own_layout(conf, 4)) == "split 2+2: trainer dp 1x2 tp 1, generator dp 1 tp 2"
    assert own_layout(own_layout(conf, 4).applied(conf_of()), 4) == own_layout(conf, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 33])
def test_parts_of_the_batch_have_the_size_that_was_asked_for(size, process):
    requests = mixed_requests(conf_of(), check(conf_of(), process), process)
    whole = {r.prompt_id: r for r in requests}
    assert sum(r.num_samples for r in requests) == SEQUENCES
    lengths = {len(r.tokens) for r in requests}
    assert {1, 64 - TOKENS} < lengths and len(lengths) > 4
    part = part_of(requests, size)
    assert sum(r.num_samples for r in part) == size
    assert all(r.tokens == whole[r.prompt_id].tokens for r in part)
    assert all(r.num_samples <= whole[r.prompt_id].num_samples for r in part)
    with pytest.raises(AssertionError, match="too many"):
        part_of(requests, SEQUENCES + 1)
