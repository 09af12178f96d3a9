"""The batch-invariant switch on a CPU: set once, undone, refused where it cannot hold, and what it
promises of a real run. Single operators: test_invariant_operators.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from mesh.config.loading import load_conf
from mesh.invariant.switch import batch_invariant, current, ordinary_kernels
from mesh.program.checks import invariant_problems
from mesh.types import ModelShape

DTYPES = (torch.float32, torch.bfloat16)


def test_the_switch_restores_the_ordinary_kernels_also_after_an_error():
    x, weight = torch.randn(7, 1024), torch.randn(64, 1024)
    before = F.linear(x, weight)
    with pytest.raises(RuntimeError, match="inside"), batch_invariant(True, "cpu"):
        assert current() is not None
        raise RuntimeError("inside")
    assert current() is None
    assert torch.equal(F.linear(x, weight), before)
    with batch_invariant(True, "cpu"):
        assert not torch.equal(F.linear(x, weight), before), "control: another kernel was there"


def test_the_switch_cannot_be_nested():
    with (
        batch_invariant(True, "cpu"),
        pytest.raises(AssertionError, match="already on"),
        batch_invariant(True, "cpu"),
    ):
        pass


def test_ordinary_kernels_run_inside_the_block_and_invariant_ones_after_it():
    """Also after an error, and as often as it is entered; the switch is the one that was on."""
    x, weight = torch.randn(7, 1024), torch.randn(64, 1024)
    before = F.linear(x, weight)
    with batch_invariant(True, "cpu", chunks=2):
        switch, invariant = current(), F.linear(x, weight)
        assert not torch.equal(invariant, before), "control: the kernels differ at this shape"
        for fails in (False, True, False):
            expected = pytest.raises(RuntimeError, match="inside") if fails else nullcontext()
            with expected, ordinary_kernels():
                assert current() is None
                assert torch.equal(F.linear(x, weight), before)
                if fails:
                    raise RuntimeError("inside")
            assert current() is switch is not None
            assert torch.equal(F.linear(x, weight), invariant)
    assert current() is None
    assert torch.equal(F.linear(x, weight), before)


def test_ordinary_kernels_suspend_a_switch_that_is_on_and_no_other():
    with pytest.raises(AssertionError, match="batch invariance is off"), ordinary_kernels():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_left_to_the_start_to_refuse():
    with batch_invariant(True, "cuda"):
        assert current() is None


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [128, 1024, 3072])
def test_columns_have_the_same_bits_whatever_the_degree(dtype, inputs):
    x, weight = torch.randn(19, inputs).to(dtype), torch.randn(256, inputs).to(dtype)
    with batch_invariant(True, "cpu"):
        whole = F.linear(x, weight)
        for degree in (2, 4):
            parts = [F.linear(x, part) for part in weight.chunk(degree)]
            assert torch.equal(torch.cat(parts, -1), whole)
    reference = x.double() @ weight.double().t()
    scale = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (whole.double() - reference).norm() < scale * reference.norm()


def test_what_cannot_be_exact_is_refused_all_at_once():
    shape = ModelShape(128, 128, 2, 8, 8, 32, 384)
    words = ["trainer.tp=8", "invariant.chunks=4", "trainer.dtype=bfloat16"]
    _, conf = load_conf(["conf=qwen3_tiny", "batch_invariant=true", *words])
    found = "\n".join(invariant_problems(conf, "cpu", shape))
    assert "trainer.tp=8" in found and "invariant.chunks=8" in found
    assert "generator.dtype" in found
    _, conf = load_conf(["conf=qwen3_tiny", "invariant.chunks=3"])
    assert "invariant.chunks=3" in "\n".join(invariant_problems(conf, "cpu", shape))


def test_what_a_gpu_cannot_do_exactly_is_refused():
    words = ["trainer.dtype=float32", "generator.dtype=float32"]
    _, conf = load_conf(["conf=qwen3_tiny", "batch_invariant=true", *words])
    found = "\n".join(invariant_problems(conf, "cuda", ModelShape(128, 128, 2, 8, 8, 48, 384)))
    for said in ("trainer.dtype=float32", "generator.dtype=float32", "heads of 48"):
        assert said in found
