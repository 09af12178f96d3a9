"""Gradients of entropies and of divergences from a teacher through the tiled head, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mesh.invariant.switch import batch_invariant
from mesh.model.divergence import HeadInputs
from mesh.model.logprobs import taught_logprobs, token_logprobs
from mesh.model.vocabulary import MAX_TILE, vocab_tiles
from mesh.types import IdSpans

ROWS, DIM, TEACHER_DIM = 13, 24, 40
TEXTLESS: dict[int, IdSpans] = {
    5: (),
    130: ((3, 4), (60, 130)),
    128: ((0, 17), (31, 33), (64, 65), (100, 128)),  # the first tile, holes, and the last one
    4 * 3000: ((2990, 6010),),
    MAX_TILE + 8: ((0, 5000), (9000, 9001), (20_000, MAX_TILE + 8)),  # a product for each tile
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(vocab_size: int) -> tuple[list[Tensor], HeadInputs, Tensor, list[Tensor]]:
    """(hidden and weight, the teacher's, targets, gradients of the three scores); the largest
    logits of both are of ids without a text."""
    heads = [
        (normal(ROWS, dim, seed=s), normal(vocab_size, dim, seed=s + 1) * 0.4)
        for dim, s in ((DIM, 1), (TEACHER_DIM, 3))
    ]
    known = torch.ones(vocab_size, dtype=torch.bool)
    for first, last in TEXTLESS[vocab_size]:
        known[first:last] = False
        for _, weight in heads:
            weight[first:last] *= 20
    ids = known.nonzero()[:, 0]
    targets = ids[torch.randint(len(ids), (ROWS,), generator=torch.Generator().manual_seed(5))]
    return [*heads[0]], HeadInputs(*heads[1]), targets, [normal(ROWS, seed=s) for s in (6, 7, 8)]


def exact(
    pair: list[Tensor], teacher: HeadInputs, targets: Tensor, spans: IdSpans, temperature: float
) -> tuple[Tensor, ...]:
    """The scores by their definitions in float64, over the ids that have a text."""
    known = torch.ones(len(pair[1]), dtype=torch.bool)
    for first, last in spans:
        known[first:last] = False
    picked = known.cumsum(0)[targets] - 1
    ours, theirs = (
        (hidden.double() @ weight.double()[known].T / temperature).log_softmax(-1)
        for hidden, weight in (pair, teacher)
    )
    entropy = -(ours.exp() * ours).sum(-1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    return ours.gather(1, picked[:, None])[:, 0], entropy, divergence


USED = {"all": (0, 1, 2), "entropy": (1,), "divergence": (2,), "logprob and entropy": (0, 1)}


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("vocab_size", TEXTLESS)
def test_scores_and_gradients_against_float64(vocab_size, temperature, used):
    pair, teacher, targets, upstream = inputs_of(vocab_size)
    spans = TEXTLESS[vocab_size]
    assert len(vocab_tiles(vocab_size)) > 1 or vocab_size == 5
    ours = [x.clone().requires_grad_() for x in pair]
    plain = [x.double().requires_grad_() for x in pair]
    scores = taught_logprobs(*ours, targets, temperature, None, spans, teacher)
    right = exact(plain, teacher, targets, spans, temperature)
    for found, expected in zip(scores, right, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    torch.autograd.backward([scores[i] for i in USED[used]], [upstream[i] for i in USED[used]])
    torch.autograd.backward(
        [right[i] for i in USED[used]], [upstream[i].double() for i in USED[used]]
    )
    for found, expected in zip(ours, plain, strict=True):
        scale = expected.grad.abs().max().item()
        assert scale > 0.01
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=0, atol=4e-5 * scale)
    for first, last in spans:
        assert not ours[1].grad[first:last].any(), "an id without a text has gradient exactly 0"


def gradients(pair: list[Tensor], scored, used: tuple[int, ...], upstream: list[Tensor]):
    leaves = [x.clone().requires_grad_() for x in pair]
    scores = scored(leaves)
    return torch.autograd.grad([scores[i] for i in used], leaves, [upstream[i] for i in used])


def test_what_a_loss_does_not_use_changes_no_bit_of_the_gradient():
    pair, teacher, targets, upstream = inputs_of(128)
    spans = TEXTLESS[128]

    def alone(leaves):
        return token_logprobs(*leaves, targets, 0.7, None, spans)

    def beside(leaves):
        return taught_logprobs(*leaves, targets, 0.7, None, spans, teacher)

    expected = gradients(pair, alone, (0,), upstream)
    for found in (
        gradients(pair, beside, (0,), upstream),
        gradients(pair, beside, (0, 1, 2), [upstream[0], *[torch.zeros(ROWS)] * 2]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # fmt: skip


@pytest.mark.parametrize("vocab_size", [128, MAX_TILE + 8])
def test_a_token_has_its_bits_in_every_batch(vocab_size):
    """Scores and gradients of the hidden states, of all three scores at once."""
    pair, teacher, targets, upstream = inputs_of(vocab_size)

    def of(rows: slice) -> list[Tensor]:
        hidden = pair[0][rows].clone().requires_grad_()
        theirs = HeadInputs(teacher.hidden_AD[rows], teacher.weight)
        scores = taught_logprobs(
            hidden, pair[1], targets[rows], 0.7, None, TEXTLESS[vocab_size], theirs
        )
        torch.autograd.backward(scores, [x[rows] for x in upstream])
        return [*(x.detach() for x in scores), hidden.grad]

    with batch_invariant(True, "cpu"):
        whole = of(slice(0, ROWS))
        for rows in (slice(0, 1), slice(3, 4), slice(2, 9), slice(5, ROWS)):
            for found, expected in zip(of(rows), whole, strict=True):
                assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_divergence_from_oneself_is_zero_and_has_no_gradient(scale):
    pair, _, targets, _ = inputs_of(128)
    leaves = [(pair[0] * scale).requires_grad_(), pair[1].requires_grad_()]
    oneself = HeadInputs(leaves[0].detach(), leaves[1].detach())
    scores = taught_logprobs(*leaves, targets, 1.0, None, TEXTLESS[128], oneself)
    scores.divergence_A.sum().backward()
    assert scores.divergence_A.abs().max() == 0.0
    assert all(x.grad.abs().max() < 1e-6 for x in leaves)


def test_a_teacher_of_another_vocabulary_is_an_error():
    pair, teacher, targets, _ = inputs_of(128)
    smaller = HeadInputs(teacher.hidden_AD, teacher.weight[:96])
    with pytest.raises(AssertionError, match="another vocabulary"):
        taught_logprobs(*pair, targets, 1.0, None, (), smaller)


def test_a_sharp_distribution_has_finite_gradients():
    hidden = torch.tensor([[300.0]]).requires_grad_()
    weight = torch.linspace(-1, 1, 8)[:, None]
    teacher = HeadInputs(torch.tensor([[-300.0]]), weight)
    scores = taught_logprobs(hidden, weight, torch.tensor([0]), 0.5, None, (), teacher)
    sum(x.sum() for x in scores).backward()
    assert hidden.grad.isfinite().all()
    torch.testing.assert_close(scores.divergence_A, torch.tensor([1200.0]))
