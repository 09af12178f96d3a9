"""One of our engines for `engine.py`: reads batch sizes from stdin, prints tokens per second."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

import torch

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.engine.base import Engine
from mesh.invariant.switch import batch_invariant
from mesh.layout.meshes import build_meshes, plan_layout, resolve_device
from mesh.lifecycle.process import Process, start
from mesh.model.families import shape_of_flavor
from mesh.model.layouts import weight_names
from mesh.model.products import self_test_of
from mesh.program.encoding import prompt_encoder, tokenizer_directory
from mesh.program.plan import generator_settings
from mesh.roles.generator import Generator
from mesh.text.tokenizer import load_tokenizer
from mesh.types import ModelShape, Request, Sampling
from tools.bench.vocabulary import known_ids


def main(prompt_tokens: int, words: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    _, conf = load_conf(words)
    device = resolve_device(conf.device)
    with (
        batch_invariant(conf.batch_invariant, device, conf.invariant.chunks),
        start(device, conf.timeout_seconds) as process,
    ):
        shape = shape_of_flavor(conf.model.flavor)
        textless = ((known_ids(shape.vocab_size), shape.vocab_size),)
        shape = replace(shape, textless=textless)
        engine = ready(conf, process, shape)
        process.closers.append(engine.close)
        seconds(engine, shape, prompt_tokens, 1, 1)
        print("bench: ready", flush=True)
        for line in sys.stdin:
            batch, new = int(line), conf.generator.max_new_tokens
            taken = seconds(engine, shape, prompt_tokens, batch, new)
            print(f"bench: {batch * new / taken}", flush=True)


@torch.no_grad()
def ready(conf: Conf, process: Process, shape: ModelShape) -> Engine:
    """An engine with random weights."""
    device, tokenizer = process.device, load_tokenizer(tokenizer_directory(conf))
    settings = generator_settings(conf, shape, tokenizer, resolve_device(conf.device))
    if conf.batch_invariant:
        chunks = conf.invariant.chunks
        process.say(self_test_of(shape, chunks, settings.dtype, device, process.cpu_group))
    meshes = build_meshes(plan_layout(conf, process.world_size), device.type)
    engine = Generator(settings, meshes, device, prompt_encoder(conf, tokenizer)).engine
    assert engine is not None, "a world of one process generates"
    names = weight_names(shape)
    for name, weight in engine.weights().items():
        if name in names:
            weight.fill_(1) if weight.ndim == 1 else weight.normal_(0, 0.02)
    engine.reset(0)
    return engine


def seconds(engine: Engine, shape: ModelShape, prompt: int, batch: int, new: int) -> float:
    """Time to generate a batch: wall time on a GPU, else CPU time of this process."""
    tokens = torch.randint(shape.vocab_size, (batch, prompt)).tolist()
    requests = [Request(i, tuple(row), 1) for i, row in enumerate(tokens)]
    sampling = Sampling(temperature=1.0, max_new_tokens=new, seed=0, step=0)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    completions = engine.generate(requests, sampling)
    assert sum(len(c.tokens) for c in completions) == batch * new
    return clock() - began


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
