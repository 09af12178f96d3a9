"""Exactness on real GPUs: kernels at the shapes of Qwen3, and real runs on one and on two of them.

Skipped without one. With two, trainer and generator have different layouts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import TWO_RANK_LAYOUTS, launch

from mesh.invariant.switch import batch_invariant

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

ROWS = (1, 2, 3, 7, 8, 16, 17, 31, 32, 33, 64, 65, 100, 129, 256, 257)
# Qwen3's 0.6B and 8B: inputs, outputs of a layer
SHAPES = ((1024, 2048), (2048, 1024), (1024, 3072), (3072, 1024), (4096, 1024), (12288, 4096))


def differing(inputs: int, outputs: int) -> tuple[int, int]:
    """(differing, compared): row slices and column shards of a product against the whole of it."""
    x = torch.randn(2048, inputs, device="cuda").bfloat16()
    weight = torch.randn(outputs, inputs, device="cuda").bfloat16()
    whole = F.linear(x, weight)
    pairs = []
    for rows in ROWS:
        for first in (0, 1, 777):
            part = slice(first, first + rows)
            pairs.append((F.linear(x[part], weight), whole[part]))
            for shards in (2, 4):
                columns = [F.linear(x[part], shard) for shard in weight.chunk(shards)]
                pairs.append((torch.cat(columns, -1), whole[part]))
    return sum(not torch.equal(a, b) for a, b in pairs), len(pairs)


@one_gpu
def test_products_do_not_depend_on_the_other_rows_and_columns():
    with batch_invariant(True, "cuda"):
        counts = [differing(*shape) for shape in SHAPES]
    assert sum(compared for _, compared in counts) == len(SHAPES) * len(ROWS) * 9
    assert [wrong for wrong, _ in counts] == [0] * len(SHAPES)
    assert sum(differing(*shape)[0] for shape in SHAPES) > 0, "control: without the switch"


@one_gpu
@pytest.mark.parametrize("shape", [(1024, 2048), (3072, 1024), (4096, 100), (72, 40)])
@pytest.mark.parametrize("rows", [1, 5, 16, 32, 64, 300])
def test_our_product_has_the_library_s_bits(shape, rows):
    from mesh.invariant.triton_linear import matmul

    inputs, outputs = shape
    a = torch.randn(rows, inputs, device="cuda").bfloat16()
    weight = torch.randn(outputs, inputs, device="cuda").bfloat16()
    with batch_invariant(True, "cuda"):
        library = F.linear(
            torch.cat([a, torch.zeros(512, inputs, device="cuda").bfloat16()]), weight
        )
    assert torch.equal(matmul(a, weight.t()), library[:rows])
    assert torch.equal(matmul(a, weight.t().contiguous()), library[:rows])


@one_gpu
def test_the_switch_restores_the_library_s_settings():
    x, weight = torch.randn(8, 3072).cuda().bfloat16(), torch.randn(1024, 3072).cuda().bfloat16()
    before = F.linear(x, weight), torch.backends.cuda.preferred_blas_library()
    reduction = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with batch_invariant(True, "cuda"):
        assert not torch.equal(F.linear(x, weight), before[0]), "control: another kernel was there"
    assert torch.equal(F.linear(x, weight), before[0])
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == reduction
    assert torch.backends.cuda.preferred_blas_library() == before[1]


def validated(path: Path, ranks: int) -> set[str]:
    """The rungs that a validation run on GPUs found to hold."""
    words = ["conf=qwen3_tiny", "device=cuda", f"run_dir={path}"]
    launch("recipes/validate.py", ranks, *words)
    report = json.loads((path / "validation.json").read_text())
    assert report["machine"]["device"] == torch.cuda.get_device_name()
    assert report["dtype"] == "bfloat16"
    held = [check for check in report["checks"] if check["result"] == "pass"]
    assert all(check["tally"]["compared"] > 0 for check in held)
    return {check["rung"] for check in held}


@one_gpu
def test_one_gpu_validates(tmp_path: Path):
    assert validated(tmp_path / "run", 1) == {"L0", "L1", "L2"}


@two_gpus
def test_two_gpus_validate_every_layout(tmp_path: Path):
    assert validated(tmp_path / "run", 2) == {"L0", "L1", "L2", "L3"}


@two_gpus
@pytest.mark.parametrize("words", TWO_RANK_LAYOUTS.values(), ids=TWO_RANK_LAYOUTS)
def test_a_strict_run_ends_well_on_two_gpus(words, tmp_path: Path):
    path = tmp_path / "run"
    small = ["steps=3", "eval.num_prompts=8", "log.tensorboard=false", f"run_dir={path}"]
    switch = ["device=cuda", "batch_invariant=true", "check=strict"]
    launch("recipes/grpo.py", 2, "conf=qwen3_tiny", *small, *switch, *words)
    ranks = json.loads((path / "environment.json").read_text())["ranks"]
    assert [rank["device"] for rank in ranks] == [torch.cuda.get_device_name()] * 2


@one_gpu
@pytest.mark.parametrize("tokens", [100, 5393, 16384])
def test_the_gradient_of_an_embedding_is_the_same_every_time(tokens):
    """PyTorch's is not from some 4,000 tokens on, which the control shows."""
    from mesh.model.lookup import lookup

    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(3, 98, (tokens,), device="cuda", generator=generator)
    weight = torch.randn(128, 256, device="cuda", generator=generator).requires_grad_()
    grad = torch.randn(tokens, 256, device="cuda", generator=generator)

    def repeats() -> list[torch.Tensor]:
        return [torch.autograd.grad(lookup(ids, weight), weight, grad)[0] for _ in range(50)]

    with batch_invariant(True, "cuda"):
        first, *others = repeats()
    assert all(torch.equal(first, other) for other in others)
    expected = torch.zeros(128, 256, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(first.double(), expected.index_add_(0, ids, grad.double()),
                               rtol=1e-4, atol=1e-3)  # fmt: skip
    control = repeats()
    differ = sum(not torch.equal(control[0], other) for other in control)
    assert (differ > 0) == (tokens > 4000), f"{differ} of 50 differ without the switch"


@one_gpu
@pytest.mark.parametrize("enabled", [True, False], ids=["exact", "ordinary"])
def test_the_pad_row_of_an_embedding_has_no_gradient(enabled):
    from mesh.model.lookup import lookup

    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, 9, (300,), device="cuda", generator=generator)
    weight = torch.randn(9, 64, device="cuda", generator=generator).requires_grad_()
    grad = torch.randn(300, 64, device="cuda", generator=generator)
    with batch_invariant(enabled, "cuda"):
        free, frozen = (
            torch.autograd.grad(lookup(ids, weight, row), weight, grad)[0] for row in (None, 5)
        )
    assert free[5].all() and not frozen[5].any()
    others = torch.arange(9, device="cuda") != 5
    assert torch.equal(free[others], frozen[others])
