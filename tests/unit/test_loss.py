"""The loss against hand numbers, closed-form gradients, finite differences and plain loops."""

import math

import pytest
import torch

from mesh.rl.aggregation import loss_sum, normaliser, token_weights
from mesh.rl.losses import LossTokens, TokenLoss, clipped_surrogate, kl_T
from mesh.rl.statistics import merge, stats_metrics, token_stats

# ratio, advantage -> loss, clipped; clip_low 0.2, clip_high 0.3
CASES = [
    (1.0, 2.0, -2.0, False),
    (1.25, 2.0, -2.5, False),  # inside the upper bound, outside a symmetric 0.2
    (1.5, 2.0, -2.6, True),
    (1.5, -2.0, 3.0, False),
    (0.5, 2.0, -1.0, False),
    (0.5, -2.0, 1.6, True),
    (0.75, -2.0, 1.6, True),
    (0.85, -2.0, 1.7, False),
    (3.0, 0.0, 0.0, False),
]


def clipped(logprobs_T, old_T, advantages_T, clip_low, clip_high) -> TokenLoss:
    """The surrogate on tokens of one sequence."""
    sequence_T = torch.zeros(len(logprobs_T), dtype=torch.int64)
    tokens = LossTokens(logprobs_T, old_T, advantages_T, sequence_T)
    return clipped_surrogate(tokens, clip_low=clip_low, clip_high=clip_high)


def _case_tensors():
    ratio_T, advantages_T, loss_T = torch.tensor(
        [case[:3] for case in CASES], dtype=torch.float64
    ).unbind(1)
    clipped_T = torch.tensor([case[3] for case in CASES])
    return ratio_T, advantages_T, loss_T, clipped_T


def test_policy_loss_by_hand():
    ratio_T, advantages_T, expected_T, expected_clipped_T = _case_tensors()
    old_T = torch.linspace(-3, -0.1, len(CASES), dtype=torch.float64)
    loss_T, clipped_T = clipped(old_T + ratio_T.log(), old_T, advantages_T, 0.2, 0.3)
    torch.testing.assert_close(loss_T, expected_T, rtol=1e-12, atol=1e-12)
    assert torch.equal(clipped_T, expected_clipped_T)


def test_policy_loss_is_the_papers_formula():
    """PPO eq. 7 written out, on ratios from e^-2 to e^2."""
    torch.manual_seed(0)
    logprobs_T, old_T, advantages_T = torch.randn(3, 500, dtype=torch.float64)
    ratio_T = (logprobs_T - old_T).exp()
    bounded_T = ratio_T.clamp(0.8, 1.3)
    expected_T = -torch.minimum(ratio_T * advantages_T, bounded_T * advantages_T)
    loss_T, clipped_T = clipped(logprobs_T, old_T, advantages_T, 0.2, 0.3)
    torch.testing.assert_close(loss_T, expected_T)
    assert torch.equal(clipped_T, bounded_T * advantages_T < ratio_T * advantages_T)


def test_policy_gradient_is_closed_form_and_exact():
    """-ratio * A where not clipped, exactly 0 where clipped, none to the old logprobs."""
    ratio_T, advantages_T, _, clipped_T = _case_tensors()
    old_T = torch.full_like(ratio_T, -1.0).requires_grad_()
    logprobs_T = (old_T.detach() + ratio_T.log()).requires_grad_()
    loss_T, _ = clipped(logprobs_T, old_T, advantages_T, 0.2, 0.3)
    loss_T.sum().backward()
    expected_T = torch.where(clipped_T, 0.0, -ratio_T * advantages_T)
    torch.testing.assert_close(logprobs_T.grad, expected_T, rtol=1e-12, atol=0)
    assert old_T.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_bits_give_ratio_one(dtype):
    """On-policy the loss is exactly -A and its gradient exactly -A."""
    torch.manual_seed(1)
    logprobs_T = (-10 * torch.rand(1000, dtype=dtype)).requires_grad_()
    advantages_T = torch.randn(1000, dtype=dtype)
    loss_T, clipped_T = clipped(logprobs_T, logprobs_T.detach(), advantages_T, 0.0, 0.0)
    loss_T.sum().backward()
    assert torch.equal(loss_T, -advantages_T)
    assert torch.equal(logprobs_T.grad, -advantages_T)
    assert not clipped_T.any()


def test_whole_loss_by_finite_differences():
    """Weighted policy loss + 0.1 KL; a kink lies at least 0.02 away from every ratio."""
    ratio_T, advantages_T, _, _ = _case_tensors()
    old_T = torch.linspace(-3, -0.1, len(CASES), dtype=torch.float64)
    ref_T = torch.linspace(-0.5, -4, len(CASES), dtype=torch.float64)
    weights_T = torch.linspace(0.1, 1, len(CASES), dtype=torch.float64)

    def whole(logprobs_T):
        loss_T, _ = clipped(logprobs_T, old_T, advantages_T, 0.2, 0.3)
        return loss_sum(loss_T + 0.1 * kl_T(logprobs_T, ref_T), weights_T)

    logprobs_T = (old_T + ratio_T.log()).requires_grad_()
    assert torch.autograd.gradcheck(whole, logprobs_T, eps=1e-6, atol=1e-7)


def test_kl_by_hand():
    """Probabilities 1/2 and 1/4: 1/2 - ln(1/2) - 1; swapped: 2 - ln 2 - 1; equal: 0."""
    logprobs_T = torch.tensor([0.5, 0.25, 0.3], dtype=torch.float64).log().requires_grad_()
    ref_T = torch.tensor([0.25, 0.5, 0.3], dtype=torch.float64).log().requires_grad_()
    kl = kl_T(logprobs_T, ref_T)
    kl.sum().backward()
    expected_T = torch.tensor([math.log(2) - 0.5, 1 - math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(kl, expected_T)
    torch.testing.assert_close(logprobs_T.grad, torch.tensor([0.5, -1.0, 0.0]).double())
    assert ref_T.grad is None


def test_kl_keeps_small_differences():
    """d^2 / 2 to leading order; exp(d) - d - 1 in float32 would round it to 0 or go below it."""
    d_T = torch.logspace(-6, -3, 50)
    kl = kl_T(torch.zeros(50), d_T)
    assert (kl >= 0).all()
    torch.testing.assert_close(kl[-10:], (d_T.double() ** 2 / 2).float()[-10:], rtol=1e-2, atol=0)


def kl_and_gradient(difference_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k3, and its gradient by the policy's logprobs, where the reference's are so much larger."""
    logprobs_T = (-1 - difference_T).requires_grad_()
    kl = kl_T(logprobs_T, torch.full_like(difference_T, -1.0))
    (gradient_T,) = torch.autograd.grad(kl.sum(), logprobs_T)
    return kl.detach(), gradient_T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_continues_as_a_line_where_its_exponential_would_overflow(dtype):
    """d = 199 and 99999: the tangent of exp at 20 is exp(20) * (1 + d - 20)."""
    difference_T = torch.tensor([199.0, 99999.0], dtype=dtype)
    kl, gradient_T = kl_and_gradient(difference_T)
    expected = [math.exp(20) * (d - 19) - d - 1 for d in difference_T.tolist()]
    torch.testing.assert_close(kl, torch.tensor(expected, dtype=dtype))
    torch.testing.assert_close(gradient_T, torch.full_like(kl, 1 - math.exp(20)))
    assert kl[0].item() == pytest.approx(8.7329735e10, rel=1e-6)


def test_kl_and_its_slope_are_continuous_at_the_bound():
    below, above = math.nextafter(20, 0), math.nextafter(20, 21)
    kl, gradient_T = kl_and_gradient(torch.tensor([below, 20.0, above], dtype=torch.float64))
    torch.testing.assert_close(kl, torch.full_like(kl, math.expm1(20) - 20), rtol=1e-14, atol=0)
    expected_T = torch.full_like(kl, -math.expm1(20))
    torch.testing.assert_close(gradient_T, expected_T, rtol=1e-14, atol=0)
    around_T = torch.tensor([19.0, 19.99, 20.01, 21.0], dtype=torch.float64).requires_grad_()
    zeros_T = torch.zeros_like(around_T)
    assert torch.autograd.gradcheck(lambda x_T: kl_T(-x_T, zeros_T), around_T, rtol=1e-6)


def test_kl_below_the_bound_has_the_bits_of_the_plain_formula():
    torch.manual_seed(5)
    logprobs_T = (-20 * torch.rand(4000)).requires_grad_()
    ref_T, weights_T = -20 * torch.rand(4000), torch.randn(4000)
    difference_T = ref_T - logprobs_T
    plain = torch.expm1(difference_T) - difference_T
    found = kl_T(logprobs_T, ref_T)
    assert torch.equal(found.view(torch.int32), plain.view(torch.int32))
    ours, theirs = (torch.autograd.grad((x * weights_T).sum(), logprobs_T) for x in (found, plain))
    assert torch.equal(ours[0].view(torch.int32), theirs[0].view(torch.int32))


LENGTHS = [3, 1, 5, 2]
EXPECTED = {  # plain loops over losses 1, 2, 3, ... numbered through the responses
    "token": lambda rows: sum(map(sum, rows)) / 11,
    "sequence": lambda rows: sum(sum(row) / len(row) for row in rows) / 4,
    "constant": lambda rows: sum(map(sum, rows)) / (4 * 8),
}


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_aggregations_are_the_plain_loops(aggregation):
    loss_T = torch.arange(1.0, 12.0)
    rows = [chunk.tolist() for chunk in loss_T.split(LENGTHS)]
    lengths_R = torch.tensor(LENGTHS)
    weights_T = token_weights(lengths_R, aggregation).repeat_interleave(lengths_R)
    total = loss_sum(loss_T, weights_T).item() / normaliser(11, 4, aggregation, 8)
    assert total == pytest.approx(EXPECTED[aggregation](rows), rel=1e-6)


def test_weights_and_normalisers_by_hand():
    lengths_R = torch.tensor([4, 1, 0])
    assert token_weights(lengths_R, "sequence").tolist() == [0.25, 1.0, 0.0]
    assert token_weights(lengths_R, "token").tolist() == [1.0, 1.0, 0.0]
    assert token_weights(lengths_R, "constant").dtype == torch.float32
    assert [normaliser(5, 3, a, 16) for a in EXPECTED] == [5.0, 3.0, 48.0]
    assert [normaliser(0, 0, a, 16) for a in EXPECTED] == [1.0, 1.0, 1.0]


def test_bad_aggregation_is_named():
    with pytest.raises(ValueError, match="aggregation='mean'"):
        token_weights(torch.tensor([1]), "mean")
    with pytest.raises(ValueError, match="aggregation='mean'"):
        normaliser(1, 1, "mean", 1)
    with pytest.raises(ValueError, match="constant_length=0"):
        normaliser(1, 1, "constant", 0)


def test_no_tokens_still_have_a_graph():
    """A padded pass runs forward and backward and leaves gradients of exactly 0."""
    hidden_TD = torch.ones(1, 3, requires_grad=True)
    empty_A = torch.zeros(0)
    logprobs_A = hidden_TD[torch.zeros(0, dtype=torch.int64)].sum(-1)
    loss_A, clipped_A = clipped(logprobs_A, empty_A, empty_A, 0.2, 0.2)
    total = loss_sum(loss_A + kl_T(logprobs_A, empty_A), empty_A)
    total.backward()
    assert total.item() == 0
    assert torch.equal(hidden_TD.grad, torch.zeros(1, 3))
    stats = token_stats(logprobs_A, empty_A, empty_A, clipped_A)
    assert set(stats_metrics(stats).values()) == {0.0}


def test_stats_by_hand():
    old_T = torch.zeros(4, dtype=torch.float64)
    logprobs_T = torch.tensor([2.0, 1.0, 0.5, 0.5], dtype=torch.float64).log()
    clipped_T = torch.tensor([True, 0, 0, 0])
    metrics = stats_metrics(token_stats(logprobs_T, old_T, old_T, clipped_T))
    assert metrics == pytest.approx(
        {
            "logprob_diff/max": math.log(2),
            "logprob_diff/mean": 3 * math.log(2) / 4,
            "ratio/max": 2.0,
            "ratio/mean": 1.0,
            "clip_fraction": 0.25,
        }
    )


def test_stats_of_parts_merge_to_the_whole():
    torch.manual_seed(2)
    tokens = (*torch.randn(3, 100), torch.rand(100) < 0.3)
    cuts = [slice(0, 7), slice(7, 7), slice(7, 90), slice(90, 100)]
    merged = token_stats(*(x_T[:0] for x_T in tokens))
    for cut in cuts:
        merged = merge(merged, token_stats(*(x_T[cut] for x_T in tokens)))
    whole = token_stats(*tokens)
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=0)
    assert torch.equal(merged.maxima, whole.maxima)
