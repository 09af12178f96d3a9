"""Reading a model directory, beside a plain copy of the same bytes.

    python -m tools.bench.loading [flavor=0.6B] [repeats=5]

A directory of random bfloat16 weights, which the page cache holds, is read into fp32 tensors of the
model, as the trainer of one rank reads it: on a GPU where there is one. Beside it, bfloat16 tensors
in memory are copied into such tensors. Both take turns and write into fresh memory, whose pages the
system has to provide: on a CPU the larger part of the time. There it is CPU time of the process,
which other processes do not lengthen. Exit status 1 below 1 GB/s of the file's bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from mesh.layout.reshard import Block
from mesh.model.families import config_entries, global_shapes, hf_names, shape_of_flavor
from mesh.model.hf import load_weights
from mesh.model.safetensors_files import SINGLE
from mesh.types import ModelShape
from tools.bench.report import hardware, print_row
from tools.bench.timing import paired

LEAST = 1.0  # GB/s
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str]) -> int:
    words = {"flavor": "0.6B", "repeats": "5"} | dict(word.split("=", 1) for word in argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shape = shape_of_flavor(words["flavor"])
    print(hardware())
    with tempfile.TemporaryDirectory() as directory:
        stored = write_directory(Path(directory), shape)
        size = (Path(directory) / SINGLE).stat().st_size / 1e9
        times = paired(
            lambda: read(Path(directory), shape),
            lambda: copy(stored, shape),
            repeats=int(words["repeats"]),
        )
    loading, copying = (size / seconds for seconds in times)
    print_row("model", "file", "read", "copied in memory", "ratio")
    print_row(*["---"] * 5)
    rates = (f"{size:.2f} GB", f"{loading:.2f} GB/s", f"{copying:.2f} GB/s")
    print_row(words["flavor"], *rates, f"{loading / copying:.2f}")
    if loading < LEAST:
        print(f"missed: {loading:.2f} GB/s, below {LEAST}")
    return int(loading < LEAST)


def write_directory(path: Path, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Write random weights and their config.json; returns the weights, each once, by our names."""
    names, shapes = by_file(shape), global_shapes(shape)
    weights = {n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_() for n in names.values()}
    tensors = {theirs: weights[ours] for theirs, ours in names.items()}
    save_file(tensors, path / SINGLE, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config_entries(shape, (0,))))
    return weights


def by_file(shape: ModelShape) -> dict[str, str]:
    """Our name of every tensor in a file; of a tied weight one of its two."""
    return {theirs: ours for ours, theirs in hf_names(global_shapes(shape), shape).items()}


def fresh(shape: ModelShape) -> dict[str, torch.Tensor]:
    """The trainer's tensors of one rank, as it has them before they are read."""
    shapes = global_shapes(shape)
    names = hf_names(shapes, shape)
    made = {names[name]: torch.empty(size, device=DEVICE) for name, size in shapes.items()}
    return {name: made[names[name]] for name in shapes}


def read(path: Path, shape: ModelShape) -> None:
    tensors = fresh(shape)
    blocks = {n: Block((0,) * x.dim(), tuple(x.shape)) for n, x in tensors.items()}
    load_weights(path, tensors, blocks, shape)


def copy(stored: dict[str, torch.Tensor], shape: ModelShape) -> None:
    tensors = fresh(shape)
    for name, weight in stored.items():
        tensors[name].copy_(weight.to(DEVICE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
