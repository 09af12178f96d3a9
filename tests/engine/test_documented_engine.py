"""The engine that docs/extending.md shows whole, against the native engine."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from docs_reading import blocks
from tiny_qwen3 import MAX_LENGTH, Variant, load_role, random_sequences, save_checkpoint

from mesh.engine.base import Continuation, EngineSettings
from mesh.engine.conversation import scripted
from mesh.engine.native.engine import NativeEngine
from mesh.invariant.switch import batch_invariant
from mesh.types import Request, Sampling

SETTINGS = EngineSettings(
    max_length=MAX_LENGTH,
    max_sequences=8,
    kv_tokens=2048,
    page_size=16,
    prefill_tokens=64,
    prefix_cache=True,
    cuda_graphs=False,
)
SAMPLED = Sampling(temperature=1.3, max_new_tokens=20, seed=5, step=2, stop_tokens=(3, 11))
TEXTLESS = ((20, 40),)
GREEDY = Sampling(temperature=0.0, max_new_tokens=20, seed=0, step=0)


@pytest.fixture(scope="module")
def plain_engine(tmp_path_factory):
    """The page's class, from the file that its block names."""
    (block,) = (b for b in blocks(Path("docs/extending.md")) if b.language == "python")
    file = tmp_path_factory.mktemp("extending") / "plain_engine.py"
    file.write_text(block.text)
    return runpy.run_path(str(file))["PlainEngine"]


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_it_has_the_native_engines_bits(plain_engine, sampling, solo_mesh, tmp_path):
    save_checkpoint(tmp_path, Variant(4))
    prompts = random_sequences([1, 16, 5, 40], seed=9)
    requests = [Request(10 + i, tuple(prompt), 3) for i, prompt in enumerate(prompts)]
    completed = []
    with batch_invariant(True, "cpu", 4):
        for kind in (NativeEngine, plain_engine):
            model, shape = load_role(tmp_path, solo_mesh)
            engine = kind(model, replace(shape, textless=TEXTLESS), SETTINGS, None)
            engine.reset(version=0)
            completed.append(engine.with_settings(SETTINGS).generate(requests, sampling))
    assert completed[0] == completed[1]
    drawn = {token for completion in completed[0] for token in completion.tokens}
    assert len(drawn) > 10 and not drawn & {*range(*TEXTLESS[0])}


def test_its_conversations_have_the_native_engines_bits(plain_engine, solo_mesh, tmp_path):
    save_checkpoint(tmp_path, Variant(4))
    requests = [Request(7, (5, 6, 7), 2), Request(9, (12, 13), 1)]
    keys = [(7, 0), (7, 1), (9, 0)]
    script = {key: [Continuation(*key, (41 + key[1], 42), n) for n in (5, 9)] for key in keys}
    held = []
    with batch_invariant(True, "cpu", 4):
        for kind in (NativeEngine, plain_engine):
            engine = kind(*load_role(tmp_path, solo_mesh), SETTINGS, None)
            engine.reset(version=0)
            held.append(scripted(engine, requests, SAMPLED, script))
            engine.reset(version=1)  # nothing is kept
    assert held[0] == held[1]
    assert all(len(rollout.turns) == 5 for rollout in held[0])
