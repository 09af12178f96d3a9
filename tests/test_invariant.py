"""The batch-invariant switch on a CPU: what it promises, and that the same comparison without it
differs, so that the tests can see.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import Run, launch

from mesh.checks import invariant_problems
from mesh.cli import load_conf
from mesh.invariant.reductions import tree_sum
from mesh.invariant.linear import column_linear
from mesh.invariant.switch import batch_invariant, current
from mesh.types import ModelShape

ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129, 257)
WIDTHS = ((128, 128), (384, 128), (1024, 256), (1536, 96), (3072, 64))
DTYPES = (torch.float32, torch.bfloat16)


def differing_rows(dtype: torch.dtype) -> int:
    """Row slices whose product differs from the same rows of the whole product."""
    generator = torch.Generator().manual_seed(0)
    differing = compared = 0
    for inputs, outputs in WIDTHS:
        x = torch.randn(257, inputs, generator=generator).to(dtype)
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        whole = F.linear(x, weight)
        for rows in ROWS:
            for start in {0, (257 - rows) // 2, 257 - rows}:
                part = F.linear(x[start : start + rows], weight)
                differing += not torch.equal(part, whole[start : start + rows])
                compared += 1
    assert compared > 150
    return differing


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_s_row_does_not_depend_on_the_other_rows(dtype):
    with batch_invariant(True, "cpu"):
        assert differing_rows(dtype) == 0
    assert differing_rows(dtype) > 0, "control: the ordinary kernels differ at these shapes"


def test_the_switch_restores_the_ordinary_kernels_also_after_an_error():
    x, weight = torch.randn(7, 1024), torch.randn(64, 1024)
    before = F.linear(x, weight)
    with pytest.raises(RuntimeError, match="inside"), batch_invariant(True, "cpu"):
        assert current() is not None
        raise RuntimeError("inside")
    assert current() is None
    assert torch.equal(F.linear(x, weight), before)


def test_the_switch_cannot_be_nested():
    with (
        batch_invariant(True, "cpu"),
        pytest.raises(AssertionError, match="on already"),
        batch_invariant(True, "cpu"),
    ):
        pass


def test_every_product_goes_through_the_switch():
    a, b, bias = torch.randn(5, 96), torch.randn(96, 40), torch.randn(40)
    batch = torch.randn(3, 5, 96)
    with batch_invariant(True, "cpu"):
        alone = torch.stack([row[None] @ b for row in a])[:, 0]
        assert torch.equal(a @ b, alone)
        out = torch.empty(5, 40)
        assert torch.equal(torch.mm(a, b, out=out), alone)
        assert torch.equal(torch.addmm(bias, a, b), alone + bias)
        assert torch.equal(torch.addmm(bias, a, b, beta=2, alpha=3), alone * 3 + bias * 2)
        assert torch.equal(torch.bmm(batch, b.expand(3, 96, 40))[1], batch[1] @ b)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 127, 1000])
def test_tree_sum_and_mean_do_not_depend_on_the_rows(width):
    x = torch.randn(33, width)
    assert torch.allclose(tree_sum(x), x.double().sum(-1).float(), atol=1e-4)
    with batch_invariant(True, "cpu"):
        whole = x.mean(-1)
        assert all(torch.equal(x[i : i + 1].mean(-1), whole[i : i + 1]) for i in range(33))
        assert x.mean(-1, keepdim=True).shape == (33, 1)
        assert torch.allclose(x.mean((0, 1)), x.double().mean().float(), atol=1e-5)
    assert torch.allclose(whole, x.double().mean(-1).float(), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [128, 1024, 3072])
def test_columns_have_the_same_bits_whatever_the_degree(dtype, inputs):
    x, weight = torch.randn(19, inputs).to(dtype), torch.randn(256, inputs).to(dtype)
    with batch_invariant(True, "cpu"):
        whole = column_linear(x, weight, 4)
        for degree in (2, 4):
            parts = [column_linear(x, w, 4 // degree) for w in weight.chunk(degree)]
            assert torch.equal(torch.cat(parts, -1), whole)
    reference = x.double() @ weight.double().t()
    scale = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (whole.double() - reference).norm() < scale * reference.norm()


def test_what_cannot_be_exact_is_refused_all_at_once():
    shape = ModelShape(128, 128, 2, 8, 8, 32, 384)
    words = ["trainer.tp=8", "invariant.chunks=4", "trainer.dtype=bfloat16"]
    _, conf = load_conf(["conf=qwen3_tiny", "batch_invariant=true", *words])
    found = "\n".join(invariant_problems(conf, shape))
    assert "trainer.tp=8" in found and "invariant.chunks=8" in found
    assert "generator.dtype" in found
    _, conf = load_conf(["conf=qwen3_tiny", "invariant.chunks=3"])
    assert "invariant.chunks=3" in "\n".join(invariant_problems(conf, shape))


LAYOUTS = {
    "tp differs": ["mesh.mode=split", "trainer.dp_shard=2", "trainer.tp=1", "generator.tp=2"],
    "colocated": ["trainer.tp=4", "trainer.dp_shard=1", "generator.tp=1"],
}
SMALL = ["num_prompts=16", "steps=2", "eval.every=0", "eval.num_prompts=8", "log.tensorboard=false"]


def run_of(path: Path, *words: str) -> list[dict]:
    """The metrics of the steps of a small run on 4 ranks."""
    done = launch("recipes/grpo.py", 4, "conf=qwen3_tiny", *SMALL, *words, f"run_dir={path}")
    steps = Run(path, done.stdout).metrics[1:]
    assert len(steps) == 2
    assert all(metrics["tokens/trained"] > 200 for metrics in steps)
    return steps


@pytest.mark.parametrize("name", LAYOUTS)
def test_trainer_and_generator_agree_to_the_bit_in_a_real_run(name, tmp_path: Path):
    for metrics in run_of(tmp_path / "run", *LAYOUTS[name], "batch_invariant=true"):
        assert metrics["logprob_diff/max"] == 0
        assert metrics["ratio/max"] == metrics["ratio/mean"] == 1
