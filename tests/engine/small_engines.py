"""Small engines of every kind over random weights, and what they are asked."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny_qwen3 import random_sequences

from mesh.engine.base import Engine, EngineSettings
from mesh.engine.native.engine import NativeEngine
from mesh.model.policy import Policy, build_policy, named_weights
from mesh.types import ModelShape, Request, Sampling

MAX_LENGTH = 128
SHAPE = ModelShape(
    vocab_size=128, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=96,
    tied=False, max_positions=MAX_LENGTH,
)  # fmt: skip
ROOMY = EngineSettings(
    max_length=MAX_LENGTH,
    max_sequences=64,
    kv_tokens=8192,
    page_size=32,
    prefill_tokens=8192,
    prefix_cache=True,
    cuda_graphs=False,
)
SAMPLED = Sampling(temperature=1.3, max_new_tokens=20, seed=5, step=2, stop_tokens=(3, 11))
GREEDY = Sampling(temperature=0.0, max_new_tokens=20, seed=0, step=0)
LENGTHS = [1, 16, 5, 40, 70, 1, 33, 2, 64, 15]
CPU = torch.device("cpu")


def requests(num_samples: int = 3, lengths=LENGTHS) -> list[Request]:
    prompts = random_sequences(lengths, seed=9, vocab_size=128)
    return [Request(10 + 7 * i, tuple(p), num_samples) for i, p in enumerate(prompts)]


@torch.no_grad()
def policy(mesh, seed: int, shape: ModelShape = SHAPE) -> Policy:
    """A random policy that wanders, whose norms are not ones."""
    generator = torch.Generator().manual_seed(seed)
    model = build_policy(shape, MAX_LENGTH, CPU, torch.float32, mesh)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, 0.2, generator=generator)
    return model


class Maker:
    """Builds engines by kind: native, titan (vLLM with our model), vllm (with its own)."""

    def __init__(self, mesh) -> None:
        self.mesh = mesh
        self.built: list[Engine] = []

    def __call__(self, kind: str, seed: int = 4, shape: ModelShape = SHAPE, **changes):
        settings, model = replace(ROOMY, **changes), policy(self.mesh, seed, shape)
        if kind == "native":
            engine = NativeEngine(model, shape, settings, None)
        else:
            ours = model if kind == "titan" else None
            group = self.mesh.get_group("tp")
            from mesh.engine.vllm.engine import VllmEngine  # only where a test needs vLLM

            engine = VllmEngine(ours, shape, settings, group, CPU, torch.float32)
            self.built.append(engine)
        if kind == "vllm":
            copy_weights(engine, model)
        engine.reset(version=0)
        return engine


@torch.no_grad()
def copy_weights(engine, model: Policy) -> None:
    """What the weight bridge does on one rank."""
    for name, weight in engine.weights().items():
        weight.copy_({**named_weights(model), "rope_table": model.rope_table}[name])


def without_logprobs(completions):
    return [replace(completion, logprobs=()) for completion in completions]


def assert_same(completions, expected):
    """The same completions, logprobs to rounding."""
    assert without_logprobs(completions) == without_logprobs(expected)
    flat, right = ([x for c in cs for x in c.logprobs] for cs in (completions, expected))
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(right), rtol=0, atol=3e-5)
