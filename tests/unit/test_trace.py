"""Traces of one sequence on both sides, and the first difference between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainer import built, conf_of, passes_in, settings_of
from tiny_qwen3 import CPU, random_sequences

from mesh.engine.native.engine import EngineSettings, NativeEngine
from mesh.engine.native.graphs import DecodeGraphs, bucket_of
from mesh.exactness.trace import (
    ModuleDifference,
    Trace,
    first_difference,
    first_not_finite,
    trace_generation,
    trace_training,
)
from mesh.invariant.switch import batch_invariant
from mesh.model import layers
from mesh.model.families import TINY
from mesh.model.parallel import local
from mesh.model.policy import build_policy
from mesh.rl.packing import Leaf, leaves
from mesh.roles.trainer import Trainer
from mesh.types import Completion, Request, Rollout, Sampling

SAMPLED = Sampling(temperature=0.8, max_new_tokens=12, seed=5, step=2, stop_tokens=(3, 11))
# prompts in pieces of 7 tokens; room for so few pages that sequences are computed again
CRAMPED = EngineSettings(64, 8, 96, 4, 7, True, False)
LENGTHS = [1, 9, 4, 17, 2, 26]
REQUESTS = [
    Request(10 + i, tuple(tokens), 3) for i, tokens in enumerate(random_sequences(LENGTHS, seed=2))
]
IN_LAYER = [
    "attention_norm", "attention.qkv_linear.wq", "attention.qkv_linear.wk",
    "attention.qkv_linear.wv", "attention.q_norm", "attention.k_norm", "attention.rope.query",
    "attention.rope.key", "attention.inner_attention", "attention.wo", "ffn_norm",
    "feed_forward.w1", "feed_forward.w3", "feed_forward.swiglu", "feed_forward.w2",
]  # fmt: skip
NAMES = [
    "tok_embeddings",
    *(f"layers.{i}{part}" for i in range(2) for part in [*(f".{name}" for name in IN_LAYER), ""]),
    "norm",
    "lm_head",
]


@pytest.fixture(scope="module")
def make(solo_mesh):
    """(trainer, engine) with the same weights."""

    def both(dtype: torch.dtype, *words: str) -> tuple[Trainer, NativeEngine]:
        conf = conf_of("generator.temperature=0.8", "model.max_length=64", *words)
        trainer = built(replace(settings_of(conf), dtype=dtype), conf)
        model = build_policy(TINY, 64, CPU, dtype, solo_mesh)
        engine = NativeEngine(model, TINY, CRAMPED, None)
        for name, weight in engine.weights().items():
            weight.copy_(local(trainer.weights()[name].detach()))
        engine.reset(version=0)
        return trainer, engine

    return both


def leaves_of(completions: list[Completion]) -> list[Leaf]:
    prompts = {r.prompt_id: r.tokens for r in REQUESTS}
    rollouts = [
        Rollout(c.prompt_id, c.sample_id, prompts[c.prompt_id], c.tokens, c.logprobs, 1.0, "stop")
        for c in completions
    ]
    return leaves(rollouts, torch.ones(len(rollouts)), torch.ones(len(rollouts)))


def traced(trainer: Trainer, share: list[Leaf], key: tuple[int, int]) -> Trace:
    """In passes of at most 100 tokens."""
    return trace_training(trainer, passes_in(share, 100), key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_make_the_same_of_a_sequence(make, dtype):
    compared = repeated = 0
    with batch_invariant(True, "cpu"):
        trainer, engine = make(dtype, "trainer.activation_checkpointing=full")
        share = leaves_of(engine.generate(REQUESTS, SAMPLED))
        rollouts = {r.key: r for leaf in share for r in leaf.rollouts}
        for key in ((10, 0), (13, 1), (15, 2)):
            mine, theirs = (
                traced(trainer, share, key),
                trace_generation(engine, REQUESTS, SAMPLED, key),
            )
            rollout = rollouts[key]
            length = rollout.num_tokens
            assert list(mine.outputs) == list(theirs.outputs) == NAMES
            response = list(range(len(rollout.prompt_tokens) - 1, length - 1))
            assert mine.positions["lm_head"] == theirs.positions["lm_head"] == response
            for name in NAMES[:-1]:
                assert mine.positions[name] == list(range(length))
                assert set(theirs.positions[name]) == set(range(length - 1))
                assert len(theirs.positions[name]) == len(theirs.outputs[name])
                compared += len(theirs.positions[name])
                repeated += len(theirs.positions[name]) - (length - 1)
            assert theirs.outputs["lm_head"][:, 0].tolist() == list(rollout.logprobs)
            assert theirs.outputs["layers.1.feed_forward.swiglu"].shape[1] == TINY.ffn_dim
            assert first_difference(mine, theirs) is None
            assert first_difference(theirs, mine) is None
    assert engine.preemptions > 0 and compared > 2000 and repeated > 200
    assert engine.observer is None


def test_control_without_the_switch_they_differ(make):
    trainer, engine = make(torch.float32)
    share, key = leaves_of(engine.generate(REQUESTS, SAMPLED)), (13, 0)
    mine, theirs = traced(trainer, share, key), trace_generation(engine, REQUESTS, SAMPLED, key)
    assert first_difference(mine, theirs) is not None, "ordinary kernels differ at these shapes"


def test_the_module_that_differs_is_named(make, monkeypatch):
    """The second layer's gate rounds differently for one token of one sequence, in decode steps."""
    key, position, feature = (13, 1), 20, 300
    swiglu = layers.swiglu
    with batch_invariant(True, "cpu"):
        trainer, engine = make(torch.float32)
        mine = traced(trainer, leaves_of(engine.generate(REQUESTS, SAMPLED)), key)
        gate = mine.outputs["layers.1.feed_forward.w1"][position]

        def broken(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            out = swiglu(x, up)
            rows = (x[0] == gate).all(-1)
            out[0, rows, feature] = torch.nextafter(out[0, rows, feature], torch.tensor(torch.inf))
            return out

        monkeypatch.setattr(layers, "swiglu", broken)
        wrong = trace_generation(engine, REQUESTS, SAMPLED, key)
    found = first_difference(mine, wrong)
    assert found is not None
    name = "layers.1.feed_forward.swiglu"
    assert (found.module, found.position, found.feature) == (name, position, feature)
    assert (found.count, found.width) == (1, TINY.ffn_dim)
    row = mine.outputs[name][position]
    assert found.values[0] == float(row[feature])
    assert found.values[1] == float(torch.nextafter(row[feature], torch.tensor(torch.inf)))


def hand_made(**changed: float) -> Trace:
    outputs = {name: torch.arange(6.0).view(3, 2) for name in ("first", "second")}
    for place, value in changed.items():
        name, row, feature = place.split("_")
        outputs[name][int(row), int(feature)] = value
    return Trace(outputs, {"first": [0, 2, 1], "second": [0, 2, 1]})


def test_the_first_difference_is_the_earliest_position_then_the_earliest_module():
    right = hand_made()
    assert first_difference(right, hand_made()) is None
    found = first_difference(right, hand_made(first_1_0=9.0, second_2_1=7.0))
    assert found == ModuleDifference("second", 1, 1, (5.0, 7.0), 1, 2)
    found = first_difference(right, hand_made(second_1_1=9.0, first_1_0=7.0, first_1_1=8.0))
    assert found == ModuleDifference("first", 2, 0, (2.0, 7.0), 2, 2)
    found = first_difference(right, hand_made(first_0_0=-0.0))
    assert found is not None and found.count == 1, "0.0 and -0.0 have different bits"
    nan = hand_made(second_0_1=torch.nan)
    assert first_difference(nan, nan) is None
    assert first_difference(right, nan) is not None
    assert first_not_finite(nan) == ("second", 0) and first_not_finite(right) is None
    both = hand_made(second_2_0=torch.inf, first_1_0=torch.nan)
    assert first_not_finite(both) == ("second", 1)


def test_every_time_that_a_position_was_computed_counts():
    right = hand_made()
    positions = {"first": [0, 2, 2], "second": [0, 2, 2]}
    for row in (1, 2):
        outputs = {name: rows[[0, 1, 1]].clone() for name, rows in right.outputs.items()}
        twice = Trace(outputs, positions)
        assert first_difference(right, twice) is None
        outputs["second"][row, 0] += 1
        for a, b in ((right, twice), (twice, right)):
            found = first_difference(a, b)
            assert found is not None and (found.module, found.position) == ("second", 2)


def test_traces_that_have_nothing_in_common_are_no_success(make):
    with pytest.raises(AssertionError, match="no row in common"):
        first_difference(Trace({}, {}), Trace({}, {}))
    with pytest.raises(AssertionError, match="different modules"):
        first_difference(hand_made(), Trace({}, {}))
    _, engine = make(torch.float32)
    with pytest.raises(ValueError, match=r"\(10, 3\)"):
        trace_generation(engine, REQUESTS, SAMPLED, (10, 3))
    assert engine.observer is None


@torch.no_grad()
def test_a_decode_step_without_its_graph_has_the_graph_s_shapes(make):
    """What the eager replay of a captured step runs: padded rows, the whole page table."""
    _, engine = make(torch.float32)
    graphs = DecodeGraphs(engine.model, engine.cache, engine.table_width)
    seen = []
    hook = engine.model.norm.register_forward_hook(lambda *args: seen.append(args[2].shape))
    rows = torch.tensor([[0, 5, 0, 1], [0, 6, 1, 2], [0, 7, 2, 3], [0, 5, 0, 4], [0, 6, 1, 5]])
    hidden = graphs.run_eagerly(rows)
    hook.remove()
    assert seen == [(1, bucket_of(5), TINY.dim)] and hidden.shape == (5, TINY.dim)
    assert torch.isfinite(hidden).all()
