"""Truncated distributions: sets against their definition, and the head over them in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from mesh.engine.choice import choose, tile_logits
from mesh.engine.sampler import token_keys
from mesh.invariant.switch import batch_invariant
from mesh.model import token_sets
from mesh.model.divergence import HeadInputs
from mesh.model.logprobs import taught_logprobs, token_logprobs
from mesh.model.token_sets import Listed, Packed, TokenSets, kept
from mesh.model.truncated import FRACTION, cut_of, masses, outside
from mesh.model.vocabulary import MASKED, MAX_TILE
from mesh.types import Distribution, IdSpans, Sampling

ROWS, DIM, TEMPERATURE = 7, 24, 0.8
TOP_K, TOP_P = Distribution(TEMPERATURE, top_k=5), Distribution(TEMPERATURE, top_p=0.7)
BOTH = Distribution(TEMPERATURE, top_k=20, top_p=0.9)
DISTRIBUTIONS = pytest.mark.parametrize("distribution", [TOP_K, TOP_P, BOTH], ids=str)
TEXTLESS: dict[int, IdSpans] = {
    128: ((0, 9), (98, 128)),
    130: ((3, 4), (120, 130)),
    MAX_TILE + 8: ((0, 5000), (20_000, 20_001)),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def set_of(logits: list[float], distribution: Distribution) -> set[int]:
    """The definition, by a plain loop over exact sums of float64 exponentials."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    order = order[: distribution.top_k or None]
    top = max(logits)
    mass = {v: Fraction(math.exp((logits[v] - top) / distribution.temperature)) for v in order}
    wanted, total, found = (
        Fraction(str(distribution.top_p)) * sum(mass.values()),
        Fraction(0),
        set(),
    )
    for v in order:
        if distribution.top_p < 1 and total >= wanted:
            break
        found.add(v)
        total += mass[v]
    return found


def inside(logits_AV: torch.Tensor, distribution: Distribution) -> torch.Tensor:
    return ~outside(logits_AV, cut_of(logits_AV, distribution), 0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    "distribution",
    [TOP_K, TOP_P, BOTH, Distribution(1.0, 300, 0.99), Distribution(0.3, 0, 1e-9)],
    ids=str,
)
def test_sets_are_those_of_the_definition(distribution, spread):
    logits_AV = spread * normal(60, 200)
    logits_AV[30:40] = logits_AV[30:40].mul(2 / spread).round() * spread / 2  # ties
    logits_AV[40] = 0.0
    logits_AV[41, ::2] = -0.0
    logits_AV[41, 1::2] = 0.0
    for row, found in zip(logits_AV, inside(logits_AV, distribution), strict=True):
        assert set(found.nonzero()[:, 0].tolist()) == set_of(row.tolist(), distribution)


def test_masses_are_the_exponential_to_fp32_and_integers():
    logits = torch.linspace(-40, 0, 5001)[None] * TEMPERATURE * math.log(2)
    found = masses(logits, torch.zeros(1, 1), TEMPERATURE)
    exact = (logits.double() / TEMPERATURE).exp() * 2.0**FRACTION
    assert found.dtype == torch.int64
    assert ((found - exact).abs() <= 1 + 4e-6 * exact).all(), "40 * 2^-24 is a rounded exponent"
    assert masses(torch.zeros(1, 1), torch.zeros(1, 1), 1.0).item() == pytest.approx(2**40)
    assert masses(torch.tensor([[-1e20, math.nan]]), torch.zeros(1, 1), 1.0).tolist() == [[0, 0]]
    assert 2**18 * masses(torch.zeros(1, 1), torch.zeros(1, 1), 1.0).item() < 2**62


@DISTRIBUTIONS
def test_a_set_does_not_depend_on_the_other_rows_or_the_order_of_ids_without_ties(distribution):
    logits_AV = 3 * normal(40, 300)
    whole = inside(logits_AV, distribution)
    for first, last in ((0, 1), (3, 20), (39, 40)):
        assert torch.equal(inside(logits_AV[first:last], distribution), whole[first:last])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(inside(logits_AV[:, order], distribution), whole[:, order])
    shards = [
        ~outside(part, cut_of(logits_AV, distribution), first)
        for first, part in zip((0, 150), logits_AV.chunk(2, -1), strict=True)
    ]
    assert torch.equal(torch.cat(shards, -1), whole)


def test_what_is_not_finite_stays_in_the_set():
    logits_AV = normal(3, 50)
    logits_AV[0, 7], logits_AV[1, 7], logits_AV[2] = math.nan, math.inf, math.nan
    for distribution in (TOP_K, TOP_P, BOTH):
        assert inside(logits_AV, distribution)[:, 7].all()


def head(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = normal(vocab, DIM, seed=1) * 0.5
    for first, last in TEXTLESS[vocab]:
        weight[first:last] *= 40  # the largest logits are without a text
    return normal(ROWS, DIM), weight


def sets_in(hidden, weight, distribution: Distribution, spans: IdSpans) -> torch.Tensor:
    """bool [A, V]: the sets by the definition."""
    logits = F.linear(hidden, weight)
    for first, last in spans:
        logits[:, first:last] = MASKED
    found = torch.zeros_like(logits, dtype=torch.bool)
    for row, one in zip(found, logits.tolist(), strict=True):
        row[list(set_of(one, distribution))] = True
    return found


def exact_scores(hidden, weight, teacher, found, temperature: float) -> tuple[torch.Tensor, ...]:
    """Logprobs [A, V], entropy and KL to the teacher in float64 over sets that are held fixed."""
    logprobs, theirs = (
        ((x.double() @ w.double().t()) / temperature)
        .masked_fill(~found, -torch.inf)
        .log_softmax(-1)
        for x, w in ((hidden, weight), teacher)
    )
    p = logprobs.exp()
    logs, their_logs = (x.masked_fill(~found, 0.0) for x in (logprobs, theirs))
    return logprobs, -(p * logs).sum(-1), (p * (logs - their_logs)).sum(-1)


@DISTRIBUTIONS
@pytest.mark.parametrize("vocab", TEXTLESS)
def test_scores_and_gradients_are_those_over_the_sets_in_float64(vocab, distribution):
    """Logprob, entropy and divergence, weighted; ids outside of every set have gradient 0."""
    hidden, weight = head(vocab)
    spans = TEXTLESS[vocab]
    teacher = HeadInputs(normal(ROWS, DIM, seed=5), weight.flip(0).roll(1, 1))
    found = sets_in(hidden, weight, distribution, spans)
    targets = found.double().cumsum(-1).argmax(-1)  # the last member of each set
    upstream = [normal(ROWS, seed=seed) for seed in (2, 3, 4)]
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    sets = TokenSets(distribution)
    scores = taught_logprobs(*ours, targets, TEMPERATURE, None, spans, teacher, sets)
    sum((x * by).sum() for x, by in zip(scores, upstream, strict=True)).backward()
    plain = [x.double().requires_grad_() for x in (hidden, weight)]
    logprobs, *others = exact_scores(*plain, teacher, found, TEMPERATURE)
    right = [logprobs.gather(1, targets[:, None])[:, 0], *others]
    sum((x * by.double()).sum() for x, by in zip(right, upstream, strict=True)).backward()
    for mine, exact in zip((*scores, *(x.grad for x in ours)),
                           (*right, *(x.grad for x in plain)), strict=True):  # fmt: skip
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)
    assert ours[1].grad[~found.any(0)].abs().max() == 0
    assert ours[1].grad[found.any(0)].abs().max() > 0


def test_the_policy_gradient_is_that_of_the_expected_reward_of_the_truncated_policy():
    """Brute force: all ids of a vocabulary of 9, weighted by their probability and reward, with the
    set held fixed. The logprobs of the whole distribution give another gradient.
    """
    hidden, weight, reward_V = normal(4, 5), normal(9, 5, seed=1), normal(9, seed=2).double()
    distribution = Distribution(TEMPERATURE, top_p=0.75)
    found = sets_in(hidden, weight, distribution, ())
    assert {*found.sum(-1).tolist()} & set(range(2, 9)), "control: some set has several ids"
    plain = weight.double().requires_grad_()
    z = (hidden.double() @ plain.t() / TEMPERATURE).masked_fill(~found, -torch.inf)
    (z.softmax(-1) @ reward_V).sum().backward()

    def estimated(sets: TokenSets | None) -> torch.Tensor:
        """E[reward * grad(logprob)] under the truncated policy."""
        leaf = weight.clone().requires_grad_()
        rows, ids = found.nonzero().unbind(1)
        logprobs = token_logprobs(hidden[rows], leaf, ids, TEMPERATURE, sets=sets).logprobs_A
        chances = z.detach().softmax(-1)[rows, ids]
        (chances * reward_V[ids] * logprobs.double()).sum().backward()
        return leaf.grad.double()

    torch.testing.assert_close(estimated(TokenSets(distribution)), plain.grad, rtol=1e-5, atol=1e-6)
    biased = estimated(None)
    assert (biased - plain.grad).norm() > 0.05 * plain.grad.norm(), "control"


@DISTRIBUTIONS
@pytest.mark.parametrize("vocab", TEXTLESS)
def test_the_engine_and_the_trainer_have_the_same_bits(vocab, distribution):
    """Whatever is packed together; every token that is drawn lies in its set."""
    hidden, weight = head(vocab)
    spans, count = TEXTLESS[vocab], 60 if vocab < 1000 else 4
    hidden = hidden.repeat(count, 1) + 0.1 * normal(ROWS * count, DIM, seed=7)
    sampling = Sampling(
        TEMPERATURE, 8, seed=7, step=3, top_k=distribution.top_k, top_p=distribution.top_p,
        truncated_logprobs=True,
    )  # fmt: skip
    ids_S2 = torch.stack([torch.arange(len(hidden)), torch.zeros(len(hidden)).long()], 1)
    keys_S = token_keys(sampling, ids_S2, ids_S2[:, 1])
    with batch_invariant(True, "cpu"), torch.no_grad():
        tokens_S, logprobs_S = choose(
            tile_logits(hidden, weight, None), keys_S, sampling, None, spans
        )
        whole = replace(sampling, truncated_logprobs=False)
        same_S, whole_S = choose(tile_logits(hidden, weight, None), keys_S, whole, None, spans)
        for rows in (slice(None), slice(0, 3), slice(5, 6), slice(11, ROWS * count)):
            scores = token_logprobs(
                hidden[rows], weight, tokens_S[rows], TEMPERATURE, None, spans,
                TokenSets(distribution),
            )  # fmt: skip
            assert torch.equal(scores.logprobs_A, logprobs_S[rows])
    assert torch.equal(same_S, tokens_S), "the draws are those without truncated logprobs"
    assert (whole_S < logprobs_S).any() and (whole_S <= logprobs_S + 1e-6).all()
    assert logprobs_S.isfinite().all() and logprobs_S.exp().max() <= 1


def test_a_target_outside_of_its_set_has_no_probability():
    hidden, weight = head(128)
    found = sets_in(hidden, weight, TOP_P, TEXTLESS[128])
    targets = (~found).double().argmax(-1)
    sets = TokenSets(TOP_P)
    scores = token_logprobs(hidden, weight, targets, TEMPERATURE, None, TEXTLESS[128], sets)
    assert scores.logprobs_A.isneginf().all() and scores.entropy_A.isfinite().all()


@pytest.mark.parametrize("form", [Listed, Packed])
def test_kept_sets_are_those_of_the_weights_that_made_them(form):
    """Under other weights the ids are the old ones; the first pass has the bits of any other."""
    hidden, weight = head(130)
    spans = TEXTLESS[130]
    distribution = Distribution(1.0, 2) if form is Listed else Distribution(3.0, top_p=0.99)
    temperature = distribution.temperature
    old = sets_in(hidden, weight, distribution, spans)
    other = weight + 0.3 * normal(130, DIM, seed=9)
    new = sets_in(hidden, other, distribution, spans)
    assert (old != new).any(), "control: the sets move"
    targets = old.double().argmax(-1)
    sets = TokenSets(distribution, keeps=True)

    def scored(w: torch.Tensor, given: TokenSets) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = w.clone().requires_grad_()
        scores = token_logprobs(hidden, leaf, targets, temperature, None, spans, given)
        scores.logprobs_A.sum().backward()
        return scores.logprobs_A.detach(), leaf.grad

    first, again, derived = (scored(weight, s) for s in (sets, sets, TokenSets(distribution)))
    assert all(isinstance(ids, form) for ids in sets.ids)
    for one in (first, again):
        assert torch.equal(one[0], derived[0]) and torch.equal(one[1], derived[1])
    plain = other.double().requires_grad_()
    z = (hidden.double() @ plain.t() / temperature).masked_fill(~old, -torch.inf)
    right = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    right.sum().backward()
    moved, grad = scored(other, sets)
    torch.testing.assert_close(moved.double(), right.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), plain.grad, rtol=3e-5, atol=3e-5)
    assert not torch.equal(moved, first[0])


def test_both_forms_of_kept_sets_hold_the_same_and_the_smaller_is_taken():
    for width in (64, 77):
        for share, form in ((0.001, Listed), (0.5, Packed)):
            members = torch.rand(50, width, generator=torch.Generator().manual_seed(3)) < share
            found = kept(members)
            assert isinstance(found, form)
            for first, last in ((0, width), (3, 50), (60, width)):
                assert torch.equal(found.inside(first, last), members[:, first:last])
            size = sum(x.nbytes for x in found if isinstance(x, torch.Tensor))
            assert size <= 50 * (width + 7) // 8


def test_sets_do_not_depend_on_how_many_rows_are_looked_at_at_once(monkeypatch):
    hidden, weight = head(128)
    targets = sets_in(hidden, weight, BOTH, TEXTLESS[128]).double().argmax(-1)

    def scored(chunk: int) -> torch.Tensor:
        monkeypatch.setattr(token_sets, "CHUNK", chunk)
        with batch_invariant(True, "cpu"):
            sets = [TokenSets(BOTH), TokenSets(BOTH, keeps=True)]
            found = [
                token_logprobs(hidden, weight, targets, TEMPERATURE, None, TEXTLESS[128], s)
                for s in (sets[0], sets[1], sets[1])
            ]
        assert len(sets[1].ids) == (ROWS if chunk == 1 else 4 if chunk == 256 else 1)
        return torch.stack([x.logprobs_A for x in found])

    whole = scored(1 << 20)
    assert torch.equal(whole[0], whole[1]) and torch.equal(whole[1], whole[2])
    assert all(torch.equal(scored(chunk), whole) for chunk in (1, 256))


def test_no_tokens_have_no_sets():
    weight = head(128)[1]
    sets = TokenSets(TOP_P, keeps=True)
    for _ in range(2):
        scores = token_logprobs(
            torch.zeros(0, DIM), weight, torch.zeros(0, dtype=torch.int64), 1.0, sets=sets
        )
        assert scores.logprobs_A.shape == (0,)
