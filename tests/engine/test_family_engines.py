"""Engines on every family: greedy text is that of `transformers`, and vLLM with our model has the
native engine's bits (L6), also where q, k and v have biases and RoPE is scaled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_engines import GREEDY, LENGTHS, ROOMY, SAMPLED, SHAPE, requests
from tiny_families import VARIANTS
from tiny_qwen3 import load_role, random_sequences, save_checkpoint

from mesh.engine.native.engine import NativeEngine
from mesh.engine.vllm.checks import install_problems
from mesh.invariant.switch import batch_invariant
from mesh.types import ModelShape, Request, RopeScaling

PROMPTS = [1, 17, 39, 64]
FAMILIES: dict[str, ModelShape] = {
    "llama": replace(
        SHAPE, family="llama", qk_norm=False, dim=72, num_heads=9, num_kv_heads=3,
        tied=True, rope_scaling=RopeScaling("llama3", 8.0, original_positions=40),
    ),
    "qwen2": replace(SHAPE, family="qwen2", qk_norm=False, qkv_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS)
@torch.no_grad()
def test_greedy_text_is_that_of_transformers(tmp_path, solo_mesh, case):
    variant = VARIANTS[case]
    theirs = save_checkpoint(tmp_path, variant)
    model, shape = load_role(tmp_path, solo_mesh)
    engine = NativeEngine(model, shape, ROOMY, None)
    engine.reset(version=0)
    prompts = random_sequences(PROMPTS, seed=3, vocab_size=variant.vocab_size)
    asked = [Request(i, tuple(prompt), 1) for i, prompt in enumerate(prompts)]
    completions = engine.generate(asked, replace(GREEDY, max_new_tokens=40))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt])
        whole = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert whole[0, len(prompt) :].tolist() == list(completion.tokens)
    drawn = {token for completion in completions for token in completion.tokens}
    assert len(drawn) > 15, "they repeat themselves: the test sees little"


@pytest.mark.timeout(600)  # the first start takes most of a minute on a busy machine
@pytest.mark.skipif(bool(install_problems("cpu")), reason="vLLM's CPU build is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_with_our_model_has_the_native_engines_bits(make, family):
    shape, asked = FAMILIES[family], requests(4, [*LENGTHS, 107, 90])
    with batch_invariant(True, "cpu"):
        native = make("native", shape=shape).generate(asked, SAMPLED)
        tight = make("titan", shape=shape, kv_tokens=224, page_size=16, prefill_tokens=37)
        assert tight.generate(asked, SAMPLED) == native
        assert tight.preemptions > 0
    assert sum(len(c.tokens) for c in native) > 500
    assert make("titan", shape=shape).generate(asked, SAMPLED) != native, "nothing to see"
