"""Cost of the batch-invariant switch: both modes paired in one run, ratios on/off.

    python -m tools.bench.invariant [linears] [model] [decode] [cpu] [flavor=0.6B]

With a GPU: every linear layer of Qwen3-0.6B and 8B over the library's default; a whole forward and
forward+backward of `flavor`, against the fastest attention torch has; decoding through the native
engine. Without one (or with `cpu`): generation and training of the tiny model. Arguments name the
parts to run; default: all that this machine can run. Exit status 1 if a target is missed. Left out:
tensor parallelism, whose cost is that of its collectives.
"""

from __future__ import annotations

import sys
from statistics import median

import torch

from mesh.invariant.switch import batch_invariant
from mesh.model.families import shape_of_flavor
from mesh.types import ModelShape
from tools.bench.invariant_model import bench_decode, bench_forward
from tools.bench.invariant_tiny import bench_tiny
from tools.bench.report import hardware, print_row
from tools.bench.timing import captured, paired

ROWS = (1, 8, 64, 512, 8192)
FLUSH_BYTES = 160 << 20  # weights of one timing in all: three times an H100's L2 cache


def main(argv: list[str]) -> int:
    parts = [word for word in argv if "=" not in word]
    flavor = dict(word.split("=", 1) for word in argv if "=" in word).get("flavor", "0.6B")
    known = ["linears", "model", "decode", "cpu"]
    if set(parts) - set(known):
        raise SystemExit(__doc__)
    gpu = torch.cuda.is_available() and "cpu" not in parts
    parts = parts or (known[:3] if gpu else ["cpu"])
    print(hardware(), flush=True)
    missed = bench_linears() if "linears" in parts else []
    missed += bench_forward(flavor) if "model" in parts else []
    missed += bench_decode(flavor) if "decode" in parts else []
    missed += bench_tiny() if "cpu" in parts else []
    for line in missed:
        print(f"missed: {line}")
    print(f"\n{len(missed)} targets missed" if missed else "\nevery target reached")
    return 1 if missed else 0


def layers_of(shape: ModelShape) -> dict[str, tuple[int, int, bool]]:
    """(inputs, outputs, row-parallel) of the linear layers; the head by its largest tile."""
    heads, kv_heads = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    return {
        "wq": (shape.dim, heads, False),
        "wk, wv": (shape.dim, kv_heads, False),
        "w1, w3": (shape.dim, shape.ffn_dim, False),
        "lm_head tile": (shape.dim, shape.vocab_size // 8, False),
        "wo": (heads, shape.dim, True),
        "w2": (shape.ffn_dim, shape.dim, True),
    }


def bench_linears() -> list[str]:
    """Time of every linear layer, on over off, at each number of rows; returns targets missed."""
    print_row("model", "layer", "K", "N", *(f"M={m}: us off, on, ratio" for m in ROWS))
    print_row(*["---"] * (4 + len(ROWS)))
    ratios: dict[tuple[bool, int], list[float]] = {}
    for flavor in ("0.6B", "8B"):
        for name, (inputs, outputs, is_row) in layers_of(shape_of_flavor(flavor)).items():
            cells = []
            for rows in ROWS:
                off, on = linear_times(rows, inputs, outputs)
                ratios.setdefault((is_row, rows), []).append(on / off)
                cells.append(f"{off:.1f}, {on:.1f}, {on / off:.2f}")
            print_row(flavor, name, str(inputs), str(outputs), *cells)
    return judge_linears(ratios)


def judge_linears(ratios: dict[tuple[bool, int], list[float]]) -> list[str]:
    missed = []
    for what, is_row, few, limit in (
        ("column-parallel, M <= 64", False, True, 1.10),
        ("column-parallel, M >= 512", False, False, 1.05),
        ("row-parallel, M <= 64", True, True, 1.25),
        ("row-parallel, M >= 512", True, False, 1.25),
    ):
        these = [
            ratio
            for (row, rows), group in ratios.items()
            if row == is_row and (rows <= 64) == few
            for ratio in group
        ]
        line = f"{what}: median {median(these):.2f}, largest {max(these):.2f} (target {limit:.2f})"
        print(line)
        missed += [line] if median(these) > limit else []
    return missed


def linear_times(rows: int, inputs: int, outputs: int) -> tuple[float, float]:
    """Microseconds (off, on) of one product in a CUDA graph, its weights read from memory."""
    copies = max(2, min(24, FLUSH_BYTES // (2 * inputs * outputs))) if rows < 512 else 3
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(copies, outputs, inputs, device="cuda", dtype=torch.bfloat16)

    def products() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    graphs = []
    for on in (False, True):
        with batch_invariant(on, "cuda"):
            graphs.append(captured(products))
    times = paired(*(graph.replay for graph in graphs), repeats=9)
    return times[0] / copies * 1e6, times[1] / copies * 1e6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
