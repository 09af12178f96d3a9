"""vLLM on real GPUs: the native engine's bits, and a KV cache that is released for training.

Skipped without one; what needs two is skipped with one.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import TWO_RANK_LAYOUTS, Run, launch, run
from tiny_qwen3 import random_sequences
from torch.distributed.device_mesh import DeviceMesh

from mesh.engine.base import EngineSettings
from mesh.engine.native.engine import NativeEngine
from mesh.engine.vllm.checks import install_problems
from mesh.exactness.trace import first_difference, trace_generation
from mesh.invariant.switch import batch_invariant
from mesh.layout.meshes import AXES
from mesh.model.policy import build_policy
from mesh.types import Completion, ModelShape, Request, Sampling

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
if GPUS < 1 or install_problems("cuda"):
    pytest.skip("needs a GPU and vLLM's CUDA build", allow_module_level=True)

two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
pytestmark = pytest.mark.timeout(600)

SHAPE = ModelShape(
    vocab_size=512, dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=768,
    tied=True, max_positions=1024, textless=((0, 2), (260, 300), (480, 512)),
)  # fmt: skip
ROOMY = EngineSettings(
    max_length=1024,
    max_sequences=256,
    kv_tokens=1 << 19,
    page_size=256,
    prefill_tokens=8192,
    prefix_cache=True,
    cuda_graphs=True,
    releases=True,
)
SAMPLED = Sampling(temperature=1.3, max_new_tokens=100, seed=5, step=2, stop_tokens=(3, 11))
CACHE_BYTES = 2 * 2 * (1 << 19) * 2 * 64 * 2
STRICT = ["device=cuda", "engine=vllm", "batch_invariant=true", "check=strict"]
SMALL = ["conf=qwen3_tiny", "steps=3", "eval.num_prompts=8", "log.tensorboard=false"]


def requests(lengths: list[int], num_samples: int) -> list[Request]:
    prompts = random_sequences(lengths, seed=9, vocab_size=512)
    return [Request(10 + 7 * i, tuple(p), num_samples) for i, p in enumerate(prompts)]


def all_have_a_text(completions: list[Completion]) -> bool:
    drawn = {token for completion in completions for token in completion.tokens}
    return not any(first <= token < last for token in drawn for first, last in SHAPE.textless)


@pytest.fixture(scope="module")
def gpu_mesh():
    """A role's mesh of this process alone."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cuda", torch.zeros(1, 1, 1, dtype=torch.int64), mesh_dim_names=AXES)
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
def test_the_captured_head_of_vllms_own_model_has_new_weights(gpu_mesh, tied):
    """Eight sequences fill a bucket, so a captured draw multiplies what an eager one does."""
    from mesh.engine.vllm.engine import VllmEngine

    shape, settings = replace(SHAPE, tied=tied), replace(ROOMY, page_size=16, releases=False)
    device, group = torch.device("cuda"), gpu_mesh.get_group("tp")
    engine = VllmEngine(None, shape, settings, group, device, torch.bfloat16)
    asked, found = requests([40, 7], 4), []
    sampling = replace(SAMPLED, stop_tokens=())
    for version in range(2):
        for weight in engine.weights().values():
            weight.fill_(1) if weight.ndim == 1 else weight.normal_(0, 0.1)
        engine.reset(version)
        found.append(engine.generate(asked, sampling))
        assert len(engine.sampler.draws.captured) > 0
        engine.sampler.draws.graphs = False
        engine.reset(version)
        assert engine.generate(asked, sampling) == found[-1]
        engine.sampler.draws.graphs = True
    assert found[0] != found[1] and all(map(all_have_a_text, found))
    engine.close()


@pytest.fixture(scope="module")
def pair(gpu_mesh):
    """(native engine, vLLM's) of one random policy, with the switch on."""
    from mesh.engine.vllm.engine import VllmEngine

    device = torch.device("cuda")
    with batch_invariant(True, "cuda"):
        model = build_policy(SHAPE, 1024, device, torch.bfloat16, gpu_mesh)
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(1) if weight.ndim == 1 else weight.normal_(0, 0.1)
        group = gpu_mesh.get_group("tp")
        native = NativeEngine(model, SHAPE, replace(ROOMY, releases=False), None)
        vllm = VllmEngine(model, SHAPE, ROOMY, group, device, torch.bfloat16)
        native.reset(0)
        vllm.reset(0)
        yield native, vllm
        vllm.close()
        native.close()


def test_vllm_has_the_native_engines_bits_with_graphs_and_preemption(pair):
    """L6: 300 sequences of mixed lengths, of which 256 run at a time; some end early."""
    native, vllm = pair
    asked = requests([1, 16, 5, 40, 70, 1, 333, 2, 64, 15, 500, 257, 900, 31, 32], 20)
    expected = native.generate(asked, SAMPLED)
    assert {c.finish_reason for c in expected} == {"stop", "length"}
    assert sum(len(c.tokens) for c in expected) > 10_000
    assert all_have_a_text(expected)
    assert vllm.generate(asked, SAMPLED) == expected
    assert vllm.generate(asked, SAMPLED) == expected  # from the prefix cache
    tight = vllm.with_settings(replace(ROOMY, kv_tokens=4096, prefill_tokens=300))
    assert tight.generate(asked, SAMPLED) == expected
    assert tight.preemptions > 0
    tight.close()
    eager = vllm.with_settings(replace(ROOMY, cuda_graphs=False, prefix_cache=False))
    assert eager.generate(asked, SAMPLED) == expected
    eager.close()
    for sampling in (replace(SAMPLED, top_k=5), replace(SAMPLED, temperature=0.0)):
        assert vllm.generate(asked[:4], sampling) == native.generate(asked[:4], sampling)


def test_requests_that_arrive_while_others_run_have_the_bits_of_all_at_once(pair):
    """With a step in flight, of which a token may belong to a sequence that has ended."""
    asked = requests([1, 16, 5, 40, 333, 2, 64, 15, 257, 31], 8)
    expected = pair[0].generate(asked, SAMPLED)
    for engine in pair:
        for every in (0, 1, 7):
            found = []
            for request in asked[::-1]:
                engine.add([request], SAMPLED)
                for _ in range(every):
                    found += engine.step()
            while engine.unfinished:
                found += engine.step()
            assert sorted(found, key=lambda c: (c.prompt_id, c.sample_id)) == expected


def test_a_sample_is_asked_for_again_while_its_last_step_is_in_flight(pair):
    native, vllm = pair
    long, short, other = requests([40, 7, 300], 2)
    sampling = replace(SAMPLED, stop_tokens=tuple(range(256)))  # most end after a token or two
    other = replace(other, prompt_id=short.prompt_id)
    expected = [native.generate([request], sampling) for request in (short, other)]
    vllm.add([long, short], sampling)
    for wanted, following in zip(expected, ([other], []), strict=True):
        found = []
        while len(found) < len(wanted):
            found += [c for c in vllm.step() if c.prompt_id == short.prompt_id]
        assert sorted(found, key=lambda c: c.sample_id) == wanted
        vllm.add(following, sampling)
    while vllm.unfinished:
        vllm.step()


def test_the_cache_is_released_and_comes_back(pair):
    native, vllm = pair
    asked = requests([40, 7, 300], 3)
    expected = native.generate(asked, SAMPLED)
    before = used()
    for _ in range(3):
        assert vllm.generate(asked, SAMPLED) == expected
        vllm.release()
        assert before - used() > 0.95 * CACHE_BYTES
        vllm.reset(vllm.version + 1)  # a sync comes while the cache is away
        assert before - used() > 0.95 * CACHE_BYTES
    assert vllm.generate(asked, SAMPLED) == expected
    assert abs(used() - before) < 0.05 * CACHE_BYTES
    vllm.reset(0)


def test_a_trace_sees_decode_steps_that_are_captured(pair):
    native, vllm = pair
    asked, key = requests([40, 7], 2), (10, 1)
    expected = trace_generation(native, asked, SAMPLED, key)
    found = trace_generation(vllm, asked, SAMPLED, key)
    assert first_difference(found, expected) is None
    decoded = [p for p in found.positions["layers.1.ffn_norm"] if p >= 40]
    assert len(decoded) > 5
    captured = vllm.generate(asked, SAMPLED)
    assert captured == native.generate(asked, SAMPLED), "graphs are replayed again"


def test_an_engine_that_is_closed_has_given_back_its_memory(pair):
    _, vllm = pair
    before = used()
    other = vllm.with_settings(ROOMY)
    other.generate(requests([40, 7], 2), SAMPLED)
    assert used() - before > 0.95 * CACHE_BYTES
    other.close()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert total - free - before < 0.1 * CACHE_BYTES


def used() -> int:
    gc.collect()  # engines of the test before
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_one_gpu_validates_with_vllm(tmp_path: Path):
    words = ["conf=qwen3_tiny", "device=cuda", "engine=vllm", f"run_dir={tmp_path / 'run'}"]
    launch("recipes/validate.py", 1, *words, seconds=540)
    report = json.loads((tmp_path / "run" / "validation.json").read_text())
    held = [check for check in report["checks"] if check["result"] == "pass"]
    assert all(check["tally"]["compared"] > 0 for check in held)
    assert {check["rung"] for check in held} == {"L0", "L1", "L2", "L6"}


def finished(path: Path, ranks: int, *words: str) -> Run:
    found = run("recipes/grpo.py", path, ranks, *SMALL, *words)
    assert len({m["digest/weights"] for m in found.metrics[1:]}) == 3, "weights changed"
    return found


def test_a_strict_run_ends_well_and_releases(tmp_path: Path):
    """A cache of 4 GB, of which training sees nothing."""
    found = finished(tmp_path / "run", 1, *STRICT, "generator.kv_tokens=8388608")
    assert all(m["logprob_diff/max"] == 0 for m in found.metrics[1:])
    assert all(m["gpu_gb/train"] + 3 < m["gpu_gb/generate"] for m in found.metrics[1:])


def test_vllms_own_model_follows_the_trainer(tmp_path: Path):
    words = ["device=cuda", "engine=vllm", "vllm.model=native", "sync.verify=every"]
    found = finished(tmp_path / "run", 1, *words)
    assert all(m["logprob_diff/max"] < 0.25 for m in found.metrics[1:])


@two_gpus
@pytest.mark.parametrize("words", TWO_RANK_LAYOUTS.values(), ids=TWO_RANK_LAYOUTS)
def test_a_strict_run_ends_well_on_two_gpus(words, tmp_path: Path):
    found = finished(tmp_path / "run", 2, *STRICT, *words)
    assert all(m["logprob_diff/max"] == 0 for m in found.metrics[1:])


@two_gpus
def test_vllms_own_model_follows_the_trainer_on_two_gpus(tmp_path: Path):
    words = ["device=cuda", "engine=vllm", "vllm.model=native", "sync.verify=every"]
    finished(tmp_path / "run", 2, *words, "trainer.dp_shard=2", "generator.tp=2")
