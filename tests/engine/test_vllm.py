"""The contract of `mesh.engine`, kept by all engines: ours, vLLM with our model, vLLM with its own.

With the switch on, vLLM with our model has the native engine's bits (L6).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_engines import (
    CPU,
    GREEDY,
    LENGTHS,
    MAX_LENGTH,
    ROOMY,
    SAMPLED,
    SHAPE,
    Maker,
    assert_same,
    copy_weights,
    policy,
    requests,
    without_logprobs,
)
from tiny_qwen3 import packed

from mesh.engine.vllm.checks import CPU_HEADS, install_problems
from mesh.exactness.trace import first_difference, trace_generation
from mesh.invariant.switch import batch_invariant
from mesh.model.layouts import role_layouts
from mesh.model.policy import named_weights
from mesh.weights.bridge import WeightBridge

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

import psutil  # vLLM brings it

from mesh.engine.vllm import core, fused
from mesh.engine.vllm.engine import VllmEngine

pytestmark = pytest.mark.timeout(600)  # the first start takes most of a minute on a busy machine

KINDS = ["native", "titan", "vllm"]


@pytest.fixture(scope="module")
def engines(make):
    """{kind: a roomy engine}; a test that changes its weights puts them back."""
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def expected(engines):
    """What the native engine makes of `requests()`, sampled."""
    return engines["native"].generate(requests(), SAMPLED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, top_k=5, top_p=0.8)])
@torch.no_grad()
def test_tokens_and_logprobs_follow_the_full_forward(engines, solo_mesh, kind, sampling):
    """Greedy tokens are the likeliest ones; logprobs have the temperature and no truncation."""
    asked = requests(2)
    completions = engines[kind].generate(asked, sampling)
    assert_same(completions, engines["native"].generate(asked, sampling))
    prompts = {r.prompt_id: list(r.tokens) for r in asked}
    batch = packed([prompts[c.prompt_id] + list(c.tokens) for c in completions])
    model = policy(solo_mesh, 4)
    scores_A = batch.scores(model, sampling.temperature or 1.0).logprobs_A
    likeliest_A = (
        model.lm_head.weight
        @ model.hidden(batch.tokens_T, batch.positions_T, batch.context)[batch.index_A].T
    )
    sizes = [n - 1 for n in batch.lengths]
    rows = zip(completions, scores_A.split(sizes), likeliest_A.argmax(0).split(sizes), strict=True)
    for completion, scores, likeliest in rows:
        n = len(completion.tokens)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), scores[-n:], rtol=0, atol=2e-5
        )
        assert sampling.temperature or list(completion.tokens) == likeliest[-n:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_those_of_the_counter(engines, kind):
    """By sample, step and seed, and not by the batch or its order."""
    engine, asked = engines[kind], requests(2, [20, 7])
    runs = [replace(SAMPLED, stop_tokens=(), **x) for x in ({}, {"seed": 6}, {"step": 3})]
    tokens = [c.tokens for run in runs for c in engine.generate(asked, run)]
    assert len(set(tokens)) == 12
    alone = [c.tokens for r in asked[::-1] for c in engine.generate([r], runs[0])]
    assert alone == [*tokens[2:4], *tokens[:2]]
    assert [c.tokens for c in engine.generate(asked[::-1], runs[0])] == tokens[:4]
    assert [c.tokens for c in engines["native"].generate(asked, runs[0])] == tokens[:4]


@pytest.mark.parametrize("kind", KINDS)
def test_responses_end_at_a_stop_token_or_at_the_limit(engines, expected, kind):
    engine = engines[kind]
    unstopped = engine.generate(requests(), replace(SAMPLED, stop_tokens=()))
    for whole, completion in zip(unstopped, engine.generate(requests(), SAMPLED), strict=True):
        assert len(whole.tokens) == 20 and whole.finish_reason == "length"
        stops = [i for i, token in enumerate(whole.tokens) if token in SAMPLED.stop_tokens]
        length = stops[0] + 1 if stops else 20
        assert completion.tokens == whole.tokens[:length]
        assert len(completion.logprobs) == length
        assert completion.finish_reason == ("stop" if stops else "length")
    assert {c.finish_reason for c in expected} == {"stop", "length"}
    (first,) = engine.generate(requests(1, [9]), replace(GREEDY, max_new_tokens=1))
    stop = replace(GREEDY, max_new_tokens=1, stop_tokens=first.tokens)
    assert first.finish_reason == "length"
    assert engine.generate(requests(1, [9]), stop)[0].finish_reason == "stop"


@pytest.mark.parametrize("kind", KINDS)
def test_no_requests_give_no_completions(engines, kind):
    assert engines[kind].generate([], SAMPLED) == []
    assert engines[kind].generate(requests(num_samples=0), SAMPLED) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_before_anything_runs(engines, kind):
    engine, asked = engines[kind], requests(1, [5])
    for length in (MAX_LENGTH - 19, 0):
        with pytest.raises(ValueError, match="prompt 10: .*raise model.max_length or generator.kv"):
            engine.generate(requests(1, [length]), GREEDY)
    with pytest.raises(ValueError, match="same prompt_id"):
        engine.generate(asked * 2, GREEDY)
    with pytest.raises(ValueError, match="ask for at least 1"):
        engine.generate(asked, replace(GREEDY, max_new_tokens=0))
    longest = engine.generate(requests(1, [MAX_LENGTH - 20]), GREEDY)
    assert_same(longest, engines["native"].generate(requests(1, [MAX_LENGTH - 20]), GREEDY))


@pytest.mark.parametrize("kind", KINDS)
def test_more_prompts_than_cache_change_no_completion(make, expected, kind):
    """Queued, preempted, prefilled in pieces, without a prefix cache: nothing shows."""
    tight = make(kind, kv_tokens=192, prefill_tokens=8, prefix_cache=False, max_sequences=8)
    assert_same(tight.generate(requests(), SAMPLED), expected)
    assert tight.preemptions > 0


@pytest.mark.parametrize("kind", KINDS)
def test_after_new_weights_and_a_reset_an_engine_is_a_fresh_one(engines, make, solo_mesh, kind):
    """And without the reset a prefix cache would serve the old weights' keys: seen here."""
    engine, asked = engines[kind], requests(2, [70, 100])
    before = engine.generate(asked, SAMPLED)
    copy_weights(engine, policy(solo_mesh, 6))
    stale = engine.generate(asked, SAMPLED)
    engine.reset(version=1)
    after = engine.generate(asked, SAMPLED)
    fresh = make("native", seed=6).generate(asked, SAMPLED)
    copy_weights(engine, policy(solo_mesh, 4))
    engine.reset(version=2)
    assert_same(after, fresh)
    assert without_logprobs(after) != without_logprobs(before)
    assert_same(engine.generate(asked, SAMPLED), before)
    if kind != "native":  # whose cache does not outlive a call
        assert without_logprobs(stale) != without_logprobs(fresh)


@pytest.mark.parametrize("kind", ["titan", "vllm"])
def test_pages_of_other_weights_are_not_found_if_the_cache_is_not_dropped(
    make, solo_mesh, monkeypatch, kind
):
    """Their keys carry the weights' version."""
    engine, asked = make(kind), requests(2, [70, 100])
    engine.generate(asked, SAMPLED)
    copy_weights(engine, policy(solo_mesh, 6))
    monkeypatch.setattr(engine.core, "reset_prefix_cache", lambda: True)
    monkeypatch.setattr(engine, "_zero_cache", lambda: None)
    engine.reset(version=1)
    assert_same(engine.generate(asked, SAMPLED), make("native", 6).generate(asked, SAMPLED))


@pytest.mark.parametrize("kind", ["titan", "vllm"])
def test_a_sync_that_does_nothing_is_not_missed(make, solo_mesh, kind):
    """The digest of what was written, and the addresses of what vLLM has."""
    engine, model = make(kind), policy(solo_mesh, 6)
    source = {**named_weights(model), "rope_table": model.rope_table}
    weights = engine.weights()
    layouts = role_layouts(SHAPE, MAX_LENGTH, solo_mesh.mesh, fsdp=False)
    layouts = [layout for layout in layouts if layout.name in weights]
    world = dist.group.WORLD
    bridge = WeightBridge(
        {name: source[name] for name in weights}, weights, layouts, layouts,
        dtype=torch.float32, group=world, cpu_group=world, allow_alias=False,
    )  # fmt: skip
    bridge.sync()
    engine.reset(version=1)
    fresh = make("native", 6).generate(requests(), SAMPLED)
    assert_same(engine.generate(requests(), SAMPLED), fresh)
    bridge.local_copies = []
    model.norm.weight.data += 1
    with pytest.raises(RuntimeError, match="weights differ after sync 2(?s:.*)norm.weight"):
        bridge.sync()
    parts = engine.runner.get_model().get_submodule(
        "policy.norm" if kind == "titan" else "model.norm"
    )
    parts.weight = torch.nn.Parameter(parts.weight.detach().clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match="vLLM has replaced norm.weight since"):
        engine.reset(version=2)


@pytest.mark.parametrize("kind", ["native", "titan"])
def test_an_engine_without_weights_refuses(make, solo_mesh, engines, kind):
    engine = engines[kind]
    version, engine.version = engine.version, -1
    with pytest.raises(ValueError, match="no weights yet"):
        engine.generate(requests(), GREEDY)
    engine.version = version


@torch.no_grad()
def test_ids_without_a_text_are_never_drawn(make, solo_mesh):
    """By no engine, where their logits are the largest; logprobs are those of the rest alone."""
    shape = replace(SHAPE, textless=((0, 2), (40, 60), (100, 128)))
    without = [i for first, last in shape.textless for i in range(first, last)]
    known = torch.tensor([i for i in range(128) if i not in without])
    model = policy(solo_mesh, 4, shape)
    model.lm_head.weight[without] *= 30
    samplings = (GREEDY, SAMPLED, replace(SAMPLED, top_k=5, top_p=0.8))
    asked, found = requests(2), {}
    with batch_invariant(True, "cpu"):
        for kind in KINDS:
            engine = make(kind, shape=shape)
            engine.weights()["lm_head.weight"][without] *= 30
            found[kind] = [engine.generate(asked, sampling) for sampling in samplings]
        plain = make("native")
        plain.weights()["lm_head.weight"][without] *= 30
        drawn = {token for c in plain.generate(asked, SAMPLED) for token in c.tokens}
    assert drawn & {*without}, "control: they would be drawn"
    assert found["titan"] == found["native"]
    prompts = {r.prompt_id: list(r.tokens) for r in asked}
    for kind in KINDS:
        for sampling, completions in zip(samplings, found[kind], strict=True):
            tokens = [list(c.tokens) for c in completions]
            assert not {*without} & {token for row in tokens for token in row}
            batch = packed([prompts[c.prompt_id] + list(c.tokens) for c in completions])
            hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.context)
            logits_AV = hidden_TD[batch.index_A] @ model.lm_head.weight[known].T
            logits_AV = logits_AV.double() / (sampling.temperature or 1.0)
            sizes = [n - 1 for n in batch.lengths]
            for completion, logits in zip(completions, logits_AV.split(sizes), strict=True):
                right = logits[-len(completion.tokens) :].log_softmax(-1)
                index = torch.searchsorted(known, torch.tensor(completion.tokens))
                picked = right.gather(1, index[:, None])[:, 0]
                logprobs = torch.tensor(completion.logprobs, dtype=torch.float64)
                torch.testing.assert_close(logprobs, picked, rtol=0, atol=3e-5)
                assert sampling.temperature or torch.equal(index, right.argmax(-1))


@pytest.mark.parametrize("tied", [True, False])
def test_vllm_has_the_native_engines_bits(make, tied):
    """L6: mixed lengths, preempted, in pieces, cached; tokens and logprobs bit for bit."""
    shape = replace(SHAPE, tied=tied, head_dim=24)  # of which vLLM's own attention has no kernel
    asked = requests(8, [*LENGTHS, 107, 90, 31, 32])
    with batch_invariant(True, "cpu"):
        native = make("native", shape=shape).generate(asked, SAMPLED)
        roomy = make("titan", shape=shape)
        tight = make("titan", shape=shape, kv_tokens=224, page_size=16, prefill_tokens=37)
        assert roomy.generate(asked, SAMPLED) == native
        assert roomy.generate(asked, SAMPLED) == native  # from the prefix cache
        assert tight.generate(asked, SAMPLED) == native
        assert tight.preemptions > 0
    assert sum(len(c.tokens) for c in native) > 1000
    plain = make("titan", shape=shape).generate(asked, SAMPLED)
    assert plain != native, "the switch changes no bit of this batch: the test cannot see"


def test_a_trace_of_vllm_names_the_module_that_differs(make, solo_mesh):
    """What check=strict and the validation ask of an engine, with prompts that share pages."""
    asked, key = requests(3, [40, 7, 64]), (10, 1)
    with batch_invariant(True, "cpu"):
        native, vllm = make("native"), make("titan", prefill_tokens=37)
        theirs = trace_generation(native, asked, SAMPLED, key)
        assert first_difference(trace_generation(vllm, asked, SAMPLED, key), theirs) is None
        assert vllm.observer is None
        vllm.model.layers["1"].ffn_norm.weight.data[5] += 0.5
        vllm.reset(version=1)
        found = first_difference(trace_generation(vllm, asked, SAMPLED, key), theirs)
    assert found is not None and found.module == "layers.1.ffn_norm" and found.position == 0


def test_an_engine_binds_the_trainers_storage(make, solo_mesh):
    other, engine = policy(solo_mesh, 6), make("titan")
    engine.bind({**named_weights(other), "rope_table": other.rope_table})
    engine.reset(version=1)
    assert_same(
        engine.generate(requests(), SAMPLED), make("native", 6).generate(requests(), SAMPLED)
    )
    other.norm.weight.data.zero_()
    engine.reset(version=2)
    greedy = engine.generate(requests(1, [5]), replace(GREEDY, max_new_tokens=2))
    assert greedy[0].tokens == (0, 0)


def test_a_start_and_an_end_leave_the_process_as_it_was(solo_mesh):
    world, names = dist.GroupMember.WORLD, set(dist.distributed_c10d._world.pg_map)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    threads, count = torch.set_num_threads, dist.distributed_c10d._world.group_count
    users, children = list(core._users), psutil.Process().children(recursive=True)
    engine = Maker(solo_mesh)("titan")
    engine.generate(requests(), SAMPLED)
    assert core._users == [*users, engine.core]
    assert psutil.Process().children(recursive=True) == children, "it runs in this process"
    engine.close()
    assert core._users == users
    assert dist.GroupMember.WORLD is world and torch.set_num_threads is threads
    assert dist.distributed_c10d._world.group_count == count
    if not users:
        assert set(dist.distributed_c10d._world.pg_map) == names
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    dist.barrier(dist.new_group(backend="gloo"))


def test_weights_that_a_sync_would_not_reach_are_refused(engines):
    """vLLM packs a copy of a linear layer on a CPU; size-0 and meta weights are the same trap."""
    model = engines["vllm"].runner.get_model()
    layer = model.model.layers[1].mlp.gate_up_proj
    layer.cpu_linear = lambda *args: None
    with pytest.raises(RuntimeError, match="packed copies.*model.layers.1.mlp.gate_up_proj"):
        engines["vllm"].weights()
    layer.cpu_linear = torch.nn.functional.linear
    kept, layer.weight = layer.weight, torch.nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(RuntimeError, match="packed copies.*model.layers.1.mlp.gate_up_proj"):
        engines["vllm"].weights()
    layer.weight = kept
    assert engines["vllm"].weights().keys() == set(named_weights(engines["titan"].model))


def test_every_weight_of_vllms_own_model_is_covered(engines):
    """Views tile the fused parameters: no element of vLLM's is left to its random core."""
    model, weights = engines["vllm"].runner.get_model(), engines["vllm"].weights()
    starts = {(w.data_ptr(), w.numel()) for w in weights.values()}
    theirs = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert sum(n for _, n in starts) == sum(theirs.values())
    assert all(w.is_contiguous() for w in weights.values())


def test_vllm_packs_where_it_is_left_to_itself(solo_mesh, make, monkeypatch):
    """The trap is there: without `unpacked` the engine refuses to hand out its weights."""
    monkeypatch.setattr(fused, "_multiply_by_parameter", fused.utils.dispatch_cpu_unquantized_gemm)
    group = solo_mesh.get_group("tp")
    engine = VllmEngine(None, SHAPE, ROOMY, group, CPU, torch.float32)
    make.built.append(engine)
    with pytest.raises(RuntimeError, match="packed copies of weights"):
        engine.weights()


def test_stale_shared_memory_of_ours_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, namespace = os.getpid(), core._pid_namespace()
    prefix = f"{core.PREFIX}-{namespace}"
    stale, living = f"{prefix}-{dead.pid}-0-tp:0", f"{prefix}-{mine}-0-tp:0"
    others = [f"{core.PREFIX}-1-{dead.pid}-0-tp:0", f"-tp:{dead.pid}", "torch_1", living]
    for name in (stale, *others):
        (tmp_path / name).touch()
    assert core.remove_stale_segments(tmp_path) == [stale]
    assert {file.name for file in tmp_path.iterdir()} == set(others)


def test_the_head_sizes_are_vllms():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEADS) == CPUAttentionBackend.get_supported_head_sizes()
