"""The embedding whose gradient has one order of sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mesh.model.lookup import OrderedLookup


@pytest.mark.parametrize("width", [8, OrderedLookup.COLUMNS + 3])
def test_its_gradient_is_the_sum_of_the_rows_of_each_token(width):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 6, (50,), generator=generator)
    weight = torch.randn(9, width, generator=generator, requires_grad=True)
    grad = torch.randn(50, width, generator=generator)
    rows = OrderedLookup.apply(tokens, weight, None)
    assert torch.equal(rows, F.embedding(tokens, weight))
    (found,) = torch.autograd.grad(rows, weight, grad)
    expected = torch.zeros(9, width, dtype=torch.float64).index_add_(0, tokens, grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert not found[0].any() and not found[6:].any(), "tokens that do not occur have none"


def test_a_bfloat16_gradient_is_rounded_once():
    tokens, weight = torch.zeros(300, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.bfloat16)
    rows = OrderedLookup.apply(tokens, weight.requires_grad_(), None)
    (found,) = torch.autograd.grad(rows, weight, torch.ones(300, 1, dtype=torch.bfloat16))
    assert found[0, 0] == 300, "sums of ones in bfloat16 end at 256"
