"""Measure the main job on real runs and compare the figures with their targets.

    python -m tools.bench.main [seeds=3] [modes=colocated,split] [gpu=true|false] [key=value ...]

Without a GPU: `conf=qwen3_tiny` on 2 ranks, for each mode and seed, then the native engine by
itself. With one (`gpu=false`: do not use it): `conf=qwen3 model.init=random`, 10 steps of 64
prompts x 8 samples x 256 tokens. Other arguments go to the recipe. Exit status 1 if a target is
missed. Left out: several GPUs, other engines.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from mesh.config.loading import load_conf
from mesh.lifecycle.process import start
from mesh.program.assembly import Program, assemble, check, sync
from mesh.types import Request, Sampling
from tools.bench.measured_run import MeasuredRun, run_recipe
from tools.bench.report import hardware, print_row
from tools.bench.sizes import ON_GPU
from tools.bench.vocabulary import with_tokenizer

START_BELOW = 0.35
END_AT_LEAST = 0.85
MOST_SECONDS = 300
MOST_RSS = 1.5e9
LEAST_TOKENS_PER_SECOND = 3000
BATCH, NEW_TOKENS, REPEATS = 64, 128, 5


def main(argv: list[str]) -> int:
    options, words = read_words(argv)
    runs = Path(tempfile.mkdtemp(prefix="bench-main-"))
    print(hardware())
    print(f"runs and their output: {runs}\n", flush=True)
    if options["gpu"] == "true":
        bench_gpu(words, runs)
        return 0
    missed = bench_learning(options["modes"].split(","), int(options["seeds"]), words, runs)
    missed += bench_engine()
    for line in missed:
        print(f"missed: {line}")
    print(f"\n{len(missed)} targets missed" if missed else "\nevery target reached")
    return 1 if missed else 0


def read_words(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the recipe's arguments."""
    gpu = "true" if torch.cuda.is_available() else "false"
    options = {"seeds": "3", "modes": "colocated,split", "gpu": gpu}
    given = dict(word.split("=", 1) for word in argv if word.partition("=")[0] in options)
    options |= given
    if options["gpu"] not in ("true", "false") or not options["seeds"].isdigit():
        raise SystemExit(__doc__)
    return options, [word for word in argv if word.partition("=")[0] not in options]


def bench_learning(modes: list[str], seeds: int, words: list[str], runs: Path) -> list[str]:
    """A row for each mode and seed; returns the targets missed."""
    print_row(
        "mode", "seed", "start", "end", "0.85 at step", "wall s", "CPU s",
        "peak RSS MB by rank", "generate tok/s", "train tok/s",
        "generate/exchange/train/sync s per step",
    )  # fmt: skip
    print_row(*["---"] * 11)
    missed = []
    for mode in modes:
        for seed in range(seeds):
            run = run_recipe(
                "grpo", 2, ["conf=qwen3_tiny", *words, f"mesh.mode={mode}", f"seed={seed}"],
                runs / f"{mode}-{seed}",
            )  # fmt: skip
            print_row(mode, str(seed), *learning_row(run))
            missed += [f"{mode}, seed {seed}: {line}" for line in targets_missed(run)]
    return missed


def learning_row(run: MeasuredRun) -> list[str]:
    curve = accuracies(run)
    reached = [step for step, accuracy in curve if accuracy >= END_AT_LEAST]
    return [
        f"{curve[0][1]:.3f}",
        f"{curve[-1][1]:.3f}",
        str(reached[0]) if reached else "never",
        f"{run.wall_seconds:.0f}",
        f"{run.cpu_seconds:.0f}",
        " ".join(f"{peak / 1e6:.0f}" for _, peak in sorted(run.peak_rss.items())),
        *phase_columns(run),
    ]


def accuracies(run: MeasuredRun) -> list[tuple[int, float]]:
    """(step, eval/accuracy) of every evaluation."""
    return [(m["step"], m["eval/accuracy"]) for m in run.metrics if "eval/accuracy" in m]


def phase_columns(run: MeasuredRun) -> list[str]:
    """Tokens per second of both phases, then seconds of all four: medians over the steps."""
    phases = ("generate", "exchange", "train", "sync")
    return [
        f"{step_median(run, 'tokens_per_second/generate'):,.0f}",
        f"{step_median(run, 'tokens_per_second/train'):,.0f}",
        "/".join(f"{step_median(run, f'seconds/{phase}'):.3f}" for phase in phases),
    ]


def step_median(run: MeasuredRun, key: str) -> float:
    return median(m[key] for m in run.metrics if key in m)


def targets_missed(run: MeasuredRun) -> list[str]:
    """The targets that the run has missed, each as text."""
    curve, peak = accuracies(run), max(run.peak_rss.values())
    checks = [
        (curve[0][1] < START_BELOW, f"starts at {curve[0][1]:.3f}, not below {START_BELOW}"),
        (curve[-1][1] >= END_AT_LEAST, f"ends at {curve[-1][1]:.3f}, below {END_AT_LEAST}"),
        (run.wall_seconds <= MOST_SECONDS, f"{run.wall_seconds:.0f} s, over {MOST_SECONDS}"),
        (peak <= MOST_RSS, f"{peak / 1e6:.0f} MB on one rank, over {MOST_RSS / 1e6:.0f}"),
    ]
    return [text for reached, text in checks if not reached]


def bench_engine() -> list[str]:
    """Tokens per second of the native engine by itself, on one thread as in the main job."""
    os.environ["OMP_NUM_THREADS"] = "1"  # or `start` takes every core
    torch.set_num_threads(1)
    sizes = [f"generator.max_new_tokens={NEW_TOKENS}", f"generator.max_sequences={BATCH}"]
    _, conf = load_conf(["conf=qwen3_tiny", "device=cpu", "model.max_length=256", *sizes])
    with start("cpu", 600) as process:
        program = assemble(check(conf, process, training=False), process)
        sync(program)
        rates = [tokens_per_second(program) for _ in range(REPEATS + 1)][1:]
    print(
        f"\nnative engine, tiny model, batch {BATCH}, {NEW_TOKENS} new tokens each, "
        f"{torch.get_num_threads()} torch thread: median {median(rates):,.0f} tokens/s of "
        f"{REPEATS} ({min(rates):,.0f} to {max(rates):,.0f})"
    )
    if median(rates) >= LEAST_TOKENS_PER_SECOND:
        return []
    return [f"engine: {median(rates):,.0f} tokens/s, below {LEAST_TOKENS_PER_SECOND:,}"]


def tokens_per_second(program: Program) -> float:
    """Rate of prefill and decode of a full batch; without a stop token it stays full."""
    engine, encoder = program.generator.engine, program.plan.encoder
    assert engine is not None, "a world of one process is both trainer and generator"
    prompts = program.plan.task.train_prompts(0, BATCH)
    requests = [Request(p.prompt_id, encoder.tokens(p), num_samples=1) for p in prompts]
    sampling = Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS, seed=0, step=0)
    began = time.perf_counter()
    completions = engine.generate(requests, sampling)
    return sum(len(c.tokens) for c in completions) / (time.perf_counter() - began)


def bench_gpu(words: list[str], runs: Path) -> None:
    """Qwen3-0.6B from random weights on one GPU; figures without targets."""
    given = with_tokenizer([*ON_GPU, "steps=10", *words], runs / "tokenizer")
    run = run_recipe("grpo", 1, given, runs / "gpu")
    phases = ("generate", "exchange", "train", "sync")
    steps = [m for m in run.metrics if "seconds/train" in m]
    each = median(sum(m[f"seconds/{phase}"] for phase in phases) for m in steps)
    print_row(
        "steps", "s per step", "generate tok/s", "train tok/s",
        "generate/exchange/train/sync s per step", "tokens per step", "peak GPU GB", "wall s",
    )  # fmt: skip
    print_row(*["---"] * 8)
    print_row(
        str(len(steps)), f"{each:.2f}", *phase_columns(run),
        f"{step_median(run, 'tokens/generated'):,.0f}",
        f"{run.peak_gpu / 1e9:.1f}", f"{run.wall_seconds:.0f}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
