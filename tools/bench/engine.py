"""Engines side by side: tokens per second, and seconds from the start to the first token.

    python -m tools.bench.engine [conf=NAME] [batches=32] [prompt=16] [new=64] [repeats=5] ...

Every engine is a process of its own (`engine_worker.py`, `plain_vllm.py`) that starts with empty
compile caches. Engines take turns, so that other load on the machine affects all of them alike.
Without a GPU: the tiny model, and CPU time of the process, which other processes do not lengthen.
With one: the shape of Qwen3-0.6B, 256 and 8 prompts of 128 tokens, 256 new tokens each, in two
groups that fit into 80 GB, plain vLLM in both; `engines=native,plain vLLM` selects engines. Weights
are random, and no response ends early. Other arguments are configuration keys. Ratios are to the
rate of plain vLLM. Exit status 1 if a target is missed. Left out: several GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from mesh.model.attention import CUDA_PAGE
from mesh.runs.directory import cpu_model

KINDS = {
    "native": ["engine=native"],
    "native exact": ["engine=native", "batch_invariant=true"],
    "vllm titan": ["engine=vllm"],
    "vllm titan exact": ["engine=vllm", "batch_invariant=true"],
    "vllm native": ["engine=vllm", "vllm.model=native"],
    "plain vLLM": [],
}
PLAIN = "plain vLLM"
GPU_GROUPS = [
    ["native", "native exact", PLAIN],
    ["vllm titan", "vllm titan exact", "vllm native", PLAIN],
]
CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
ON_CPU = {"conf": "qwen3_tiny", "batches": "32", "prompt": "16", "new": "64", "repeats": "5"}
ON_GPU = {"conf": "qwen3", "batches": "256,8", "prompt": "128", "new": "256", "repeats": "5"}
LEAST_ON_CPU = 5000
LEAST_RATIOS = {"vllm native": 0.95, "vllm titan": 0.85}
EXACT_AT_MOST, START_AT_MOST = 1.15, 1.10


@dataclass
class Worker:
    """The process of an engine; `start`: seconds to its first token."""

    process: subprocess.Popen[str]
    start: float

    def ask(self, batch: int) -> float:
        """Tokens per second of one batch."""
        stdin = self.process.stdin
        assert stdin is not None
        print(batch, file=stdin, flush=True)
        return float(answer(self.process))


def answer(process: subprocess.Popen[str]) -> str:
    """The next line with which the worker answers."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("bench: "):
            return line.removeprefix("bench: ").strip()
    raise SystemExit(f"{process.args!r} ended with status {process.wait()}")


def start_worker(kind: str, options: dict[str, str], words: list[str], caches: str) -> Worker:
    """Start one engine, with empty caches in a directory, and wait for its first token."""
    most = max(int(batch) for batch in options["batches"].split(","))
    length = int(options["prompt"]) + int(options["new"])
    sizes = [f"conf={options['conf']}", "model.path=null", "model.init=random",
             f"model.max_length={length}", f"generator.max_new_tokens={options['new']}",
             f"generator.max_sequences={most}", "generator.prefix_cache=false"]  # fmt: skip
    if torch.cuda.is_available():
        page = 16 if kind in (PLAIN, "vllm native") else CUDA_PAGE
        sizes.append(f"generator.kv_tokens={most * (length // page + 1) * page}")  # all at a time
    module = f"tools.bench.{'plain_vllm' if kind == PLAIN else 'engine_worker'}"
    command = [sys.executable, "-m", module, options["prompt"], *sizes, *words]
    places = {name: str(Path(caches, kind.replace(" ", "_"), name)) for name in CACHES}
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, *KINDS[kind]], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **places},
    )  # fmt: skip
    first = answer(process)
    assert first == "ready", first
    return Worker(process, time.perf_counter() - began)


def main(argv: list[str]) -> int:
    on_gpu = torch.cuda.is_available()
    options = dict(ON_GPU if on_gpu else ON_CPU) | {"engines": ""}
    given = dict(word.split("=", 1) for word in argv if word.partition("=")[0] in options)
    options |= given
    words = [word for word in argv if word.partition("=")[0] not in options]
    groups = GPU_GROUPS if on_gpu else [list(KINDS)]
    if options["engines"]:
        groups = [[*dict.fromkeys([*options["engines"].split(","), PLAIN])]]
    unknown = {kind for group in groups for kind in group} - set(KINDS)
    if unknown:
        raise SystemExit(f"engines={options['engines']}: there are {', '.join(KINDS)}")
    print(torch.cuda.get_device_name() if on_gpu else f"{cpu_model()}, CPU time", flush=True)
    missed = [text for group in groups for text in bench(group, options, words, on_gpu)]
    for text in missed:
        print(f"missed: {text}")
    return 1 if missed else 0


def bench(kinds: list[str], options: dict[str, str], words: list[str], on_gpu: bool) -> list[str]:
    """Measure and print these engines side by side; returns the targets missed."""
    missed = []
    with tempfile.TemporaryDirectory() as caches:
        workers = {kind: start_worker(kind, options, words, caches) for kind in kinds}
        for batch in map(int, options["batches"].split(",")):
            rates = measure(workers, batch, int(options["repeats"]))
            show(workers, batch, options, rates)
            missed += misses(rates, workers, on_gpu)
        for worker in workers.values():
            assert worker.process.stdin is not None
            worker.process.stdin.close()
            worker.process.wait(60)
    return missed


def measure(workers: dict[str, Worker], batch: int, repeats: int) -> dict[str, float]:
    """Median rate of each engine over all turns but the first [tokens/s]."""
    turns = [{kind: w.ask(batch) for kind, w in workers.items()} for _ in range(repeats + 1)]
    return {kind: median(turn[kind] for turn in turns[1:]) for kind in workers}


def show(
    workers: dict[str, Worker], batch: int, options: dict[str, str], rates: dict[str, float]
) -> None:
    print(f"\nbatch {batch}, {options['prompt']} + {options['new']} tokens")
    print("| engine | tokens/s | over plain vLLM | start to first token [s] |")
    print("| --- | --- | --- | --- |")
    for kind, rate in rates.items():
        ratio = rate / rates[PLAIN]
        print(f"| {kind} | {rate:,.0f} | {ratio:.2f}x | {workers[kind].start:.1f} |", flush=True)


def misses(rates: dict[str, float], workers: dict[str, Worker], on_gpu: bool) -> list[str]:
    """The targets missed, each as a line of text."""
    if not on_gpu:
        ours = [kind for kind in ("vllm titan", "vllm native") if kind in rates]
        slow = [kind for kind in ours if rates[kind] < LEAST_ON_CPU]
        return [f"{kind}: {rates[kind]:,.0f} tokens/s, below {LEAST_ON_CPU:,}" for kind in slow]
    found = [
        f"{kind}: {rates[kind] / rates[PLAIN]:.2f} of plain vLLM's rate, below {least}"
        for kind, least in LEAST_RATIOS.items()
        if kind in rates and rates[kind] < least * rates[PLAIN]
    ]
    for kind in ("native", "vllm titan"):
        if kind in rates and f"{kind} exact" in rates:
            exact = rates[kind] / rates[f"{kind} exact"]
            if exact > EXACT_AT_MOST:
                found.append(f"{kind} exact: {exact:.2f}x slower, over {EXACT_AT_MOST}")
    limit = START_AT_MOST * workers[PLAIN].start
    late = [kind for kind, worker in workers.items() if worker.start > limit]
    return found + [f"{kind}: first token after {workers[kind].start:.0f} s" for kind in late]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
