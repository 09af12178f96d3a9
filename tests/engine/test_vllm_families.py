"""vLLM's own model of every family beside Qwen3, which test_vllm.py has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from small_engines import GREEDY, MAX_LENGTH, SAMPLED, SHAPE, assert_same, policy, requests
from tiny_qwen3 import packed

from mesh.engine.vllm.checks import install_problems
from mesh.model.layouts import role_layouts
from mesh.model.policy import named_weights
from mesh.types import RopeScaling
from mesh.weights.bridge import WeightBridge

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)
PLAIN = replace(SHAPE, qk_norm=False)
SHAPES = {
    "qwen2": replace(PLAIN, family="qwen2", dim=128, qkv_bias=True, norm_eps=1e-5),
    "llama": replace(
        PLAIN, family="llama", rope_theta=5e3, tied=True, dim=96, num_heads=6,
        # beyond the original context, with frequencies that are kept, interpolated and divided
        rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, original_positions=32),
    ),
    "linear": replace(PLAIN, family="llama", rope_scaling=RopeScaling("linear", 3.0)),
    "mistral": replace(PLAIN, family="mistral"),
}  # fmt: skip


@pytest.fixture(scope="module")
def engines(make):
    """{family: an engine with weights of seed 4}"""
    return {family: make("vllm", shape=shape) for family, shape in SHAPES.items()}


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_vllms_own_model_has_the_trainers_logprobs(engines, solo_mesh, family):
    """To rounding; and its weights are views that cover all of its own."""
    engine, asked = engines[family], requests(2)
    model = policy(solo_mesh, 4, SHAPES[family])
    for sampling in (GREEDY, SAMPLED):
        completions = engine.generate(asked, sampling)
        prompts = {r.prompt_id: list(r.tokens) for r in asked}
        batch = packed([prompts[c.prompt_id] + list(c.tokens) for c in completions])
        scores = batch.scores(model, sampling.temperature or 1.0).logprobs_A
        for completion, right in zip(
            completions, scores.split([n - 1 for n in batch.lengths]), strict=True
        ):
            found = torch.tensor(completion.logprobs)
            torch.testing.assert_close(found, right[-len(found) :], rtol=0, atol=3e-5)
    theirs, weights = engine.runner.get_model(), engine.weights()
    assert weights.keys() == named_weights(model).keys()
    assert any(name.endswith(".bias") for name in weights) == SHAPES[family].qkv_bias
    views = {(w.data_ptr(), w.numel()) for w in weights.values()}
    assert sum(n for _, n in views) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("family", SHAPES)
def test_a_sync_reaches_every_weight_and_bias(engines, make, solo_mesh, family):
    shape, engine = SHAPES[family], engines[family]
    source, weights = named_weights(policy(solo_mesh, 6, shape)), engine.weights()
    layouts = role_layouts(shape, MAX_LENGTH, solo_mesh.mesh, fsdp=False)
    layouts = [layout for layout in layouts if layout.name in weights]
    world = dist.group.WORLD
    bridge = WeightBridge(
        source, weights, layouts, layouts,
        dtype=torch.float32, group=world, cpu_group=world, allow_alias=False,
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in weights.items()}
    assert bridge.sync().verified
    engine.reset(version=1)
    same = [name for name, weight in engine.weights().items() if torch.equal(weight, before[name])]
    assert not same, "the other seed has other values of every weight"
    fresh = make("native", seed=6, shape=shape).generate(requests(), SAMPLED)
    assert_same(engine.generate(requests(), SAMPLED), fresh)
