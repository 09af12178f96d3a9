"""The start-up self-test: it sees a vendor kernel whose rows depend on the batch, moves the shape
to our kernel on every rank, and refuses what depends on it there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from broken_kernels import BROKEN, SOUND, many_rows, vendor

from mesh.invariant.selftest import (
    Product,
    check_products,
    operands,
    self_test,
    shard_sizes,
)
from mesh.invariant.switch import batch_invariant, current
from mesh.model import rowwise
from mesh.model.families import TINY, shape_of_flavor
from mesh.model.products import products_of, self_test_of, tile_widths

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_shape_that_fails_is_moved_and_passes(alone):
    with vendor("mm", many_rows), batch_invariant(True, "cpu"):
        before = check_products([SOUND, BROKEN], (1, 2), torch.float32, CPU)
        line = self_test([SOUND, BROKEN], (), (1, 2), torch.float32, CPU, alone)
        assert current().choices.tiled == {(160, 48), (160, 24)}
        x, weight = torch.randn(100, 160), torch.randn(48, 160)
        assert torch.allclose(F.linear(x, weight), x @ weight.t().clone(), atol=1e-4)
        after = check_products([SOUND, BROKEN], (1, 2), torch.float32, CPU)
    assert [f.differing > 0 for f in before] == [False, True]
    assert before[1].first == "rows 0 to 1"
    assert [f.differing for f in after] == [0, 0]
    assert all(f.comparisons == 53 + 2 * 3 for f in after)
    assert line == (
        "batch-invariant: 236 comparisons of 2 shapes bitwise equal; moved to our own kernels: "
        "broken [K 160, N 48]"
    )


def test_what_is_broken_in_our_kernel_too_is_refused_by_its_shape(alone):
    calls = []

    def now_and_then(a: torch.Tensor, result: torch.Tensor) -> bool:
        calls.append(0)
        return a.shape[1] == 160 and len(calls) % 3 == 0

    with (
        vendor("mm", now_and_then),
        batch_invariant(True, "cpu"),
        pytest.raises(RuntimeError, match=r"broken \[K 160, N 48\]: \d+ of 59 differ") as refusal,
    ):
        self_test([SOUND, BROKEN], (), (1, 2), torch.float32, CPU, alone)
    assert "batch_invariant=false" in str(refusal.value)
    assert "sound" not in str(refusal.value)


@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_a_softmax_that_depends_on_the_rows_is_replaced(alone, name):
    def few_rows(x: torch.Tensor, result: torch.Tensor) -> bool:
        return x.shape[1:] == (24,) and len(x) < 8

    with vendor(name, few_rows), batch_invariant(True, "cpu"):
        line = self_test([SOUND], (16, 24), (1,), torch.float32, CPU, alone)
        assert current().choices.widths == {16}
        x = torch.randn(5, 24)
        assert torch.equal(F.softmax(x, -1)[:1], F.softmax(x[:1], -1))
    assert "softmax [K 24, N 24]" in line


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "attention"])
def test_an_operation_that_depends_on_the_rows_is_refused_by_its_name(alone, name, monkeypatch):
    whole = getattr(rowwise, name)

    def broken(x: torch.Tensor, *rest) -> torch.Tensor:
        return whole(x, *rest) * (1 + 2**-10 if len(x) < 8 else 1)

    monkeypatch.setattr(rowwise, name, broken)
    said = {"rms_norm": "RMSNorm", "swiglu": "SwiGLU", "attention": "attention, 3 tokens"}[name]
    with batch_invariant(True, "cpu"), pytest.raises(RuntimeError, match=said):
        self_test_of(TINY, 4, torch.float32, CPU, alone)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_ranks_that_share_a_kv_head_are_tested_as_such(alone, kv_heads, monkeypatch):
    """No rank multiplies by less than a head, and its queries are fewer than the head has."""
    shape = replace(TINY, num_kv_heads=kv_heads)
    keys = next(p for p in products_of(shape, 4) if p.name == "wk")
    assert shard_sizes(keys, (1, 2, 4)) == [32 * n for n in range(kv_heads, 0, -1)]
    whole, groups = rowwise.attention, set()

    def watched(q, k, *rest):
        groups.add((q.shape[1], k.shape[1]))
        return whole(q, k, *rest) * (1 + 2**-10 if q.shape[1] == 1 else 1)

    monkeypatch.setattr(rowwise, "attention", watched)
    said = "attention of one kv head on 4 ranks"
    with batch_invariant(True, "cpu"), pytest.raises(RuntimeError, match=said):
        self_test_of(shape, 4, torch.float32, CPU, alone)
    assert groups == {(4, kv_heads), (1, 1)} | ({(2, 1)} if kv_heads == 1 else set())


def test_the_operands_show_another_order_in_bfloat16_as_well():
    """One sum in two orders; with operands of random signs the last rounding hides it."""
    made = operands(Product(768, 96, ""), 64, torch.bfloat16, CPU)
    random = torch.randn(64, 768).bfloat16(), torch.randn(96, 768).bfloat16()
    shown = []
    for x, weight in (made, random):
        turned = x.float().flip(1) @ weight.float().flip(1).t()
        differs = turned.bfloat16() != (x.float() @ weight.float().t()).bfloat16()
        shown.append(differs.float().mean())
    assert shown[0] > 0.8 and shown[1] < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiny_model_passes_here_with_any_number_of_threads(alone, dtype):
    shape, threads = shape_of_flavor("tiny"), torch.get_num_threads()
    products, comparisons = products_of(shape), 0
    assert {p.name for p in products} == {"wq", "wk", "wv", "wo", "w1", "w2", "w3", "lm_head"}
    assert tile_widths(shape) == [16]
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with batch_invariant(True, "cpu"):
                assert "shapes bitwise equal" in self_test_of(shape, 4, dtype, CPU, alone)
                found = check_products(products, (1, 2, 4), dtype, CPU)
            comparisons += sum(f.comparisons for f in found)
            control = check_products(products, (1, 2, 4), dtype, CPU)
            assert [f.product for f in control] == [f.product for f in found]
            assert sum(f.differing for f in control) > 0, "control: nothing differs without"
    finally:
        torch.set_num_threads(threads)
    assert comparisons > 400
