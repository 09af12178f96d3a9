"""The validation run: what it compares, that it sees, and what it says where a kernel is broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launching import launch

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.exactness.batch import mixed_requests, part_of
from mesh.exactness.bits import Place, Tally, compare_rollouts, compare_values
from mesh.exactness.layouts import candidates, own_layout
from mesh.exactness.table import Check, line, passed, verdict, with_control
from mesh.model.families import TINY
from mesh.program.assembly import check
from mesh.types import Rollout

SMALL = [
    "conf=qwen3_tiny", "num_prompts=8", "group_size=4", "model.max_length=64",
    "generator.max_new_tokens=8", "validate.sequences=33", "validate.steps=2",
    "log.tensorboard=false",
]  # fmt: skip
SEQUENCES, TOKENS = 33, 8
BATCHES = "generator, batches of 1, 2, 3, 7, 8, 17, 33"
NAN = float("nan")


def conf_of(*words: str) -> Conf:
    return load_conf([*SMALL, *words])[1]


def validated(path: Path, num_ranks: int, *words: str, status: int = 0) -> tuple[str, dict]:
    """(stdout, validation.json) of a validation run."""
    command = [*SMALL, *words, f"run_dir={path / 'run'}"]
    done = launch("recipes/validate.py", num_ranks, *command, status=status, path=path)
    return done.stdout, json.loads((path / "run" / "validation.json").read_text())


def rows(report: dict, rung: str) -> dict[str, dict]:
    """The checks of a rung by what they compared."""
    return {check["what"]: check for check in report["checks"] if check["rung"] == rung}


def test_every_rung_holds_on_four_ranks_in_every_layout(tmp_path: Path):
    output, report = validated(tmp_path, 4)
    assert report["passed"] is True
    assert {check["result"] for check in report["checks"]} == {"pass"}, output
    batch = SEQUENCES * TOKENS
    least = {"L0": 4, "L1": batch, "L2": 8, "L3": 2 * batch}
    for rung, compared in least.items():
        assert all(row["tally"]["compared"] >= compared for row in rows(report, rung).values())
    # every engine makes all of the batch, every trainer rank its share
    sequences = 1 + 2 + 3 + 7 + 8 + 17 + 33
    assert rows(report, "L1")[BATCHES]["tally"] == {
        "compared": 4 * sequences * TOKENS, "different": 0, "not_finite": 0, "first": None,
    }  # fmt: skip
    assert rows(report, "L1")["trainer, each sequence alone"]["tally"]["compared"] == batch
    assert {row.split(":")[0] for row in rows(report, "L3")} == {
        "the whole batch on every engine", "colocated 4", "split 1+3", "split 2+2", "split 3+1",
    }  # fmt: skip
    for role in (*(f"tp {n}, generator" for n in (1, 2, 4)), "tp 2 sp,", "tp 4 sp,"):
        assert any(role in layout for layout in report["layouts"]), role
    for role in ("dp 4 tp 1", "dp 2 tp 2", "dp 1 tp 4", "dp 3 tp 1", "dp 1 tp 2"):
        assert any(layout.endswith(f"generator {role}") for layout in report["layouts"]), role
    assert report["dtype"] == "float32" and report["keys"]["batch_invariant"] is True
    assert "comparisons" in report["self_test"] and report["self_test"] in output
    assert report["machine"]["world_size"] == len(report["machine"]["ranks"]) == 4
    starts = [text[:2] for text in output.splitlines()]
    assert [starts.count(rung) for rung in least] == [len(rows(report, rung)) for rung in least]
    assert "L0, L1, L2, L3 of the exactness ladder hold here" in output


def test_bfloat16_holds_and_ordinary_kernels_would_be_seen(tmp_path: Path):
    words = ["trainer.dtype=bfloat16", "generator.dtype=bfloat16", "validate.control=true"]
    output, report = validated(tmp_path, 1, *words)
    assert report["passed"] is True and report["dtype"] == "bfloat16"
    assert report["keys"]["batch_invariant"] is True
    for rung in ("L1", "L2"):
        found = rows(report, rung).values()
        assert {row["result"] for row in found} == {"pass"}, output
        assert sum(row["differ_without"] for row in found) > 10, rung
    assert rows(report, "L2")["2 steps of the loop"]["differ_without"] > 20
    layouts = rows(report, "L3")["layouts"]
    assert (layouts["result"], layouts["not_run"]) == ("not run", "one rank")
    assert "differ without" in output and "L0, L1, L2 of the exactness ladder hold here" in output


# A task whose import breaks two kernels: SwiGLU of the last layer in small decode batches, and the
# output projection of the first attention wherever it is cut over two ranks, in both roles.
BROKEN = """
from dataclasses import dataclass

from mesh.model import layers, qwen3
from mesh.tasks.spell_backward import SpellBackward

now = {"few": False, "layer": None}


def hidden(self, tokens_T, positions_T, context):
    now["few"] = context.cache is not None and context.max_query == 1 and len(tokens_T) < 8
    return whole(self, tokens_T, positions_T, context)


def init(self, config):
    build(self, config)
    for name, layer in self.layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: now.update(layer=name))
    self.get_submodule("layers.0.attention.wo").register_forward_hook(
        lambda module, _, out: out if module.tp_group is None else out * (1 + 2**-20)
    )


def gated(gate, up):
    out = swiglu(gate, up)
    return out * (1 + 2**-10) if now["few"] and now["layer"] == "1" else out


build, whole, swiglu = qwen3.Qwen3.__init__, qwen3.Qwen3.hidden, layers.swiglu
qwen3.Qwen3.__init__, qwen3.Qwen3.hidden, layers.swiglu = init, hidden, gated


@dataclass(frozen=True)
class Task(SpellBackward):
    pass
"""


def test_broken_kernels_are_caught_and_named(tmp_path: Path):
    (tmp_path / "broken.py").write_text(BROKEN)
    output, report = validated(tmp_path, 2, "task=broken:Task", status=1)
    assert report["passed"] is False
    assert {row["result"] for row in rows(report, "L0").values()} == {"pass"}, output

    requests = mixed_requests(conf_of(), check(conf_of(), 1))
    (alone,) = part_of(requests, 1)
    batches = rows(report, "L1")[BATCHES]
    assert batches["result"] == "FAIL"
    first = batches["tally"]["first"]
    assert first["module"] == "layers.1.feed_forward.swiglu"
    assert first["module_position"] == len(alone.tokens) - 1
    assert (first["prompt_id"], first["sample_id"]) == (alone.prompt_id, 0)
    assert len(alone.tokens) <= first["position"] <= len(alone.tokens) + 1
    # the batch sizes below 8 are those that the broken kernel sees
    assert 2 < batches["tally"]["different"] <= 2 * (1 + 2 + 3 + 7) * TOKENS
    assert rows(report, "L1")["trainer, each sequence alone"]["result"] == "pass"
    loop = rows(report, "L2")["2 steps of the loop"]["tally"]["first"]
    assert loop["module"] == "layers.1.feed_forward.swiglu" and loop["step"] == 0

    by_degrees = {
        tuple("tp 2" in role for role in layout.split(",")): check
        for layout, check in rows(report, "L3").items()
        if layout.startswith("colocated")
    }
    assert by_degrees.pop((False, False))["result"] == "pass", output
    assert len(by_degrees) == 3
    for row in by_degrees.values():
        assert row["result"] == "FAIL"
        assert row["tally"]["first"]["module"] == "layers.0.attention.wo"
        assert row["tally"]["first"]["module_position"] == 0
    assert "L1, L2, L3 FAILED" in output
    assert "first differing module layers.0.attention.wo at position 0" in output


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
    assert (tally.different, tally.not_finite, tally.passed) == (0, 2, False)
    assert tally.first is not None and tally.first.position == 3
    both = compare_values({"loss": NAN}, {"loss": NAN})
    assert (both.different, both.not_finite, both.passed) == (0, 2, False)
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
    place = Place("token", ("1", "2"), 0, 3, 1, 9, 0, "layers.0.attention.wo", 7)
    bad = Check("L2", "loop", Tally(5, 2, 0, place))
    named = "first differing module layers.0.attention.wo at position 7, step 0, prompt 3, sample 1"
    assert "2 differ" in line(bad) and named in line(bad)
    control = [replace(good, tally=Tally(5, 4, 0, place)), skipped]
    assert [c.differ_without for c in with_control([good, bad, skipped], control)] == [
        4,
        None,
        None,
    ]


def test_candidates_are_every_layout_that_fits():
    everything = candidates(conf_of("validate.layouts=all"), 4, TINY)
    cover = candidates(conf_of(), 4, TINY)
    assert len(set(everything)) == len(everything) == 9 * 3 + 1 * 1 + 4 * 2 + 2 * 1
    assert set(cover) < set(everything) and len(cover) == 9 + 1 + 4 + 2
    for role in ("trainer", "generator"):
        roles = [{(c.mode, getattr(c, role)) for c in found} for found in (everything, cover)]
        assert roles[0] == roles[1]
    fewer = candidates(conf_of("validate.layouts=all"), 4, replace(TINY, num_kv_heads=2))
    assert {c.trainer.tp for c in fewer} == {c.generator.tp for c in fewer} == {1, 2}
    conf = conf_of("validate.layouts=own", "mesh.mode=split", "generator.tp=2")
    assert candidates(conf, 4, TINY) == [own_layout(conf, 4)]
    assert str(own_layout(conf, 4)) == "split 2+2: trainer dp 1x2 tp 1, generator dp 1 tp 2"
    assert own_layout(own_layout(conf, 4).applied(conf_of()), 4) == own_layout(conf, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 33])
def test_parts_of_the_batch_have_the_size_that_was_asked_for(size):
    requests = mixed_requests(conf_of(), check(conf_of(), 1))
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
