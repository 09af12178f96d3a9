"""Cost of the switch on a GPU: a whole forward, forward+backward, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import mesh.model.attention
from mesh.engine.native.engine import EngineSettings, NativeEngine
from mesh.lifecycle.process import start
from mesh.model.attention import (
    CUDA_PAGE,
    AttentionContext,
    flash_attention_2,
    packed_context,
)
from mesh.model.families import shape_of_flavor
from mesh.model.policy import Policy, build_policy
from mesh.types import ModelShape, Request, Sampling
from tools.bench.report import print_row
from tools.bench.timing import Switch, paired

PACKINGS = ((16, 512), (2, 4096))  # (sequences, tokens of each)
BATCHES, PROMPT_TOKENS, NEW_TOKENS = (8, 64, 256), 128, 128
MOST = 1.10
OFF = "off"


@contextmanager
def random_model(flavor: str, max_length: int) -> Iterator[tuple[Policy, ModelShape, Switch]]:
    """A model of random bfloat16 weights on this GPU, its shape, and the switch for it."""
    shape = shape_of_flavor(flavor)
    with start("cuda", 600) as process:
        alone: DeviceMesh = init_device_mesh(
            "cuda", (1, 1, 1), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
        )
        model = build_policy(shape, max_length, process.device, torch.bfloat16, alone)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
        yield model, shape, Switch(shape, torch.bfloat16, process.device)


def bench_forward(flavor: str) -> list[str]:
    """Rows for forward and forward+backward of both packings; returns the targets missed."""
    missed = []
    print_row(
        "packing", "pass", "off, FlashAttention 2 ms", "off, cuDNN ms", "on ms", "on / fastest off"
    )
    print_row(*["---"] * 6)
    with random_model(flavor, max(length for _, length in PACKINGS)) as (model, shape, switch):
        for sequences, length in PACKINGS:
            for name, backward in (("forward", False), ("forward+backward", True)):
                run = partial(
                    one_pass, model, switch, packed_tokens(shape, sequences, length), backward
                )
                times = paired(
                    *(partial(run, False, other) for other in (flash_attention_2, cudnn)),
                    partial(run, True),
                    repeats=9,
                )
                ratio = times[2] / min(times[:2])
                what = f"{sequences} x {length}"
                print_row(what, name, *(f"{t * 1e3:.1f}" for t in times), f"{ratio:.3f}")
                missed += [f"{what} {name}: {ratio:.3f}, over {MOST}"] if ratio > MOST else []
    return missed


def packed_tokens(
    shape: ModelShape, sequences: int, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens_T, positions_T, cu_seqlens) of sequences of one length."""
    tokens_T = torch.randint(shape.vocab_size, (sequences * length,), device="cuda")
    bounds = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * length
    return tokens_T, torch.arange(length, device="cuda").repeat(sequences), bounds


Attention = Callable[..., torch.Tensor]


def one_pass(
    model: Policy,
    switch: Switch,
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    backward: bool,
    on: bool,
    attention: Attention | None = None,
) -> None:
    """Compute logprobs of all tokens, and gradients if `backward`; `attention` replaces ours."""
    tokens_T, positions_T, bounds = tokens
    context = packed_context(bounds, int(positions_T[-1]) + 1)
    index_A = torch.arange(len(tokens_T), device="cuda")
    flash = attention or mesh.model.attention._flash
    with (
        switch(on),
        mock.patch("mesh.model.attention._flash", flash),
        torch.set_grad_enabled(backward),
    ):
        scores = model(tokens_T, positions_T, context, index_A, tokens_T.roll(-1), 1.0)
        if backward:
            scores.logprobs_A.sum().backward()
            model.zero_grad(set_to_none=True)


def cudnn(
    q_TNH: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: AttentionContext, scale: float
) -> torch.Tensor:
    """cuDNN's attention on sequences of equal length, as a batch."""
    q_SNLH, k_SKLH, v_SKLH = (
        x.unflatten(0, (-1, ctx.max_query)).transpose(1, 2) for x in (q_TNH, k, v)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(
            q_SNLH, k_SKLH, v_SKLH, is_causal=True, scale=scale, enable_gqa=True
        )
    return out.transpose(1, 2).flatten(0, 1)


def bench_decode(flavor: str) -> list[str]:
    """Rows for generation through the native engine; returns the targets missed."""
    missed = []
    print_row("batch", "off tokens/s", "on tokens/s", "on / off time")
    print_row(*["---"] * 4)
    with random_model(flavor, PROMPT_TOKENS + NEW_TOKENS) as (model, shape, switch):
        model.eval().requires_grad_(False)
        engines = [engine_of(model, shape) for _ in range(2)]
        for batch in BATCHES:
            requests = prompts_of(shape, batch)
            off, on = paired(
                *(
                    partial(answer, engine, switch, requests, on)
                    for on, engine in enumerate(engines)
                ),
                repeats=5,
            )
            rates = (f"{batch * NEW_TOKENS / t:,.0f}" for t in (off, on))
            print_row(str(batch), *rates, f"{on / off:.3f}")
            missed += [f"decode {batch}: {on / off:.3f}, over {MOST}"] if on > MOST * off else []
        for engine in engines:
            engine.close()
    return missed


def engine_of(model: Policy, shape: ModelShape) -> NativeEngine:
    length = PROMPT_TOKENS + NEW_TOKENS
    settings = EngineSettings(
        max_length=length,
        max_sequences=max(BATCHES),
        kv_tokens=max(BATCHES) * length,
        page_size=CUDA_PAGE,
        prefill_tokens=8192,
        prefix_cache=True,
        cuda_graphs=True,
    )
    engine = NativeEngine(model, shape, settings, None)
    engine.reset(version=0)
    return engine


def prompts_of(shape: ModelShape, batch: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (batch, PROMPT_TOKENS), generator=generator)
    return [Request(i, tuple(row), 1) for i, row in enumerate(tokens.tolist())]


def answer(engine: NativeEngine, switch: Switch, requests: Sequence[Request], on: int) -> None:
    """Generate for all requests; each engine captures its graphs in the mode it is used in."""
    with switch(bool(on)):
        engine.generate(requests, Sampling(1.0, NEW_TOKENS, seed=0, step=0))
