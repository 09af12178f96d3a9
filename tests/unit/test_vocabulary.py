"""Ids without a text have probability exactly 0, and entropies have one order of sums."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mesh.engine.choice import choose, tile_logits, whole_logprobs
from mesh.engine.sampler import token_keys
from mesh.invariant.switch import batch_invariant
from mesh.model.logprobs import score_tiles, token_logprobs
from mesh.model.tiles import plain_combine_scores, plain_tile_scores
from mesh.model.vocabulary import MAX_TILE, spans_within, vocab_products, vocab_tiles
from mesh.types import IdSpans, Sampling

ROWS, DIM = 6, 24
SAMPLING = Sampling(temperature=1.0, max_new_tokens=8, seed=7, step=3)
# vocabulary: ids without a text; a tile of 128 has 16 ids
TEXTLESS: dict[str, tuple[int, IdSpans]] = {
    "tail": (128, ((98, 128),)),
    "first tile and holes": (128, ((0, 17), (31, 33), (64, 65), (100, 128))),
    "all but one": (128, ((0, 77), (78, 128))),
    "uneven tiles": (130, ((3, 4), (60, 130))),
    "a product for each tile": (MAX_TILE + 8, ((0, 5000), (9000, 9001), (20_000, MAX_TILE + 8))),
}
CASES = pytest.mark.parametrize("case", TEXTLESS)


def ids_of(spans: IdSpans) -> list[int]:
    return [token_id for first, last in spans for token_id in range(first, last)]


def head_of(
    case: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, IdSpans, torch.Tensor]:
    """(hidden, weight, spans, known ids); the largest logit of each row is without a text."""
    vocab_size, spans = TEXTLESS[case]
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, DIM, generator=generator).to(dtype)
    weight = (torch.randn(vocab_size, DIM, generator=generator) * 0.3).to(dtype)
    textless = torch.tensor(ids_of(spans))
    weight[textless] *= 40
    known = torch.ones(vocab_size, dtype=torch.bool)
    known[textless] = False
    logits = F.linear(hidden, weight)
    assert torch.isin(logits.argmax(-1), textless).all(), "control: they would be drawn"
    return hidden, weight, spans, known.nonzero()[:, 0]


def all_logprobs(hidden, weight, spans, temperature: float) -> torch.Tensor:
    """Logprob of every id after each hidden state, [rows, V]."""
    rows, vocab = len(hidden), len(weight)
    targets_A = torch.arange(vocab).repeat(rows)
    hidden_AD = hidden.repeat_interleave(vocab, 0)
    scores = [
        token_logprobs(h, weight, t, temperature, None, spans)
        for h, t in zip(hidden_AD.split(512), targets_A.split(512), strict=True)
    ]
    return torch.cat([s.logprobs_A for s in scores]).view(rows, vocab)


@pytest.mark.parametrize("temperature", [1e-6, 0.7, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [name for name in TEXTLESS if TEXTLESS[name][0] < 1000])
def test_ids_without_a_text_have_probability_zero(case, dtype, temperature):
    hidden, weight, spans, known = head_of(case, dtype)
    logprobs_RV = all_logprobs(hidden, weight, spans, temperature)
    probability_RV = logprobs_RV.double().exp()
    assert probability_RV[:, ids_of(spans)].abs().max() == 0.0
    logits = F.linear(hidden, weight)[:, known].double() / temperature
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs_RV[:, known].double(), expected, rtol=1e-4, atol=1e-4)
    assert (probability_RV.sum(-1) - 1).abs().max() < 1e-4


@CASES
def test_scores_and_gradients_are_those_of_the_known_ids_alone(case):
    """Against autograd in float64 over the known rows; the other rows' gradient is exactly 0."""
    hidden, weight, spans, known = head_of(case)
    picked = torch.randint(len(known), (ROWS,), generator=torch.Generator().manual_seed(1))
    upstream = torch.linspace(-1, 1, ROWS)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    scores = token_logprobs(*ours, known[picked], 0.8, None, spans)
    scores.logprobs_A.backward(upstream)
    plain = [x.double().requires_grad_() for x in (hidden, weight)]
    logprobs = (plain[0] @ plain[1][known].T / 0.8).log_softmax(-1)
    right = logprobs.gather(1, picked[:, None])[:, 0]
    right.backward(upstream.double())
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    pairs = zip((*scores, *(x.grad for x in ours)),
                (right, entropy, *(x.grad for x in plain)), strict=True)  # fmt: skip
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    assert ours[1].grad[ids_of(spans)].abs().max() == 0.0
    assert len(known) == 1 or ours[1].grad[known].abs().max() > 0


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        replace(SAMPLING, temperature=0.0),
        replace(SAMPLING, temperature=30.0),
        replace(SAMPLING, top_k=120),  # more than there are
        replace(SAMPLING, top_k=3, top_p=0.9),
    ],
    ids=["plain", "greedy", "hot", "top_k", "top_p"],
)
@CASES
def test_they_are_never_drawn_and_both_roles_agree_to_the_bit(case, sampling):
    hidden, weight, spans, known = head_of(case)
    count = 3000 // ROWS if len(weight) < 1000 else 40
    hidden_SD = hidden.repeat(count, 1)
    ids_S2 = torch.stack([torch.arange(len(hidden_SD)), torch.zeros(len(hidden_SD)).long()], 1)
    keys_S = token_keys(sampling, ids_S2, ids_S2[:, 1])
    with batch_invariant(True, "cpu"):
        logits_SV = tile_logits(hidden_SD, weight, None)
        tokens_S, logprobs_S = choose(logits_SV, keys_S, sampling, None, spans)
        temperature = sampling.temperature or 1.0
        scores = token_logprobs(hidden_SD, weight, tokens_S, temperature, None, spans)
        whole_SV = whole_logprobs(tile_logits(hidden_SD, weight, None), temperature, None, spans)
    assert torch.equal(whole_SV.gather(1, tokens_S[:, None])[:, 0], logprobs_S), "a served model's"
    assert whole_SV[:, ids_of(spans)].exp().max() == 0
    assert torch.isin(tokens_S, known).all()
    assert torch.equal(scores.logprobs_A, logprobs_S)
    if sampling.temperature == 0:
        best = known[F.linear(hidden_SD, weight)[:, known].argmax(-1)]
        assert torch.equal(tokens_S, best)


def test_spans_are_cut_to_a_piece_and_count_from_it():
    spans = ((0, 17), (31, 33), (100, 128))
    assert spans_within(spans, 0, 128) == spans
    assert spans_within(spans, 16, 32) == ((0, 1), (15, 16))
    assert spans_within(spans, 104, 120) == ((0, 16),)
    assert spans_within(spans, 40, 100) == ()


ENTROPY_ROWS = 409
VOCABULARIES = [5, 96, 128, 130, 1000, 4 * 3000, MAX_TILE + 8]


def entropy_of(logits: torch.Tensor, num_shards: int = 1) -> torch.Tensor:
    """Entropies of these logits, from the tiles of so many vocabulary shards."""
    vocab, targets_A = logits.shape[1], torch.zeros(len(logits), dtype=torch.int64)
    scores = []
    for shard in logits.chunk(num_shards, -1):
        for edges in vocab_products(shard.shape[1], num_shards):
            piece = shard[:, edges[0] : edges[-1]].contiguous()
            scores.append(plain_tile_scores(piece, edges, targets_A, 0.9, True))
    assert sum(len(x) for x in scores) == len(vocab_tiles(vocab))
    return plain_combine_scores(torch.cat(scores), True)[1]


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_an_entropy_has_its_bits_in_every_batch(vocab_size, switch):
    """Every row alone, in batches that begin and end anywhere, and in another order."""
    rows = ENTROPY_ROWS if vocab_size < MAX_TILE else 40
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    with batch_invariant(switch, "cpu"):
        whole_A = entropy_of(logits)
        alone_A = torch.cat([entropy_of(row) for row in logits.split(1)])
        assert torch.equal(alone_A, whole_A)
        for cut in (2, 3, 7, 8, 15, 16, 17, 33, 100):
            assert torch.equal(torch.cat([entropy_of(x) for x in logits.split(cut)]), whole_A), cut
        for first in range(1, 20):
            assert torch.equal(entropy_of(logits[first:]), whole_A[first:]), first
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(4))
        assert torch.equal(entropy_of(logits[order]), whole_A[order])
    plain = (logits.double() / 0.9).log_softmax(-1)
    expected = -(plain.exp() * plain).sum(-1)
    torch.testing.assert_close(whole_A.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [96, 128, 1000, 4 * 3000, MAX_TILE + 8])
def test_an_entropy_has_its_bits_on_every_number_of_shards(vocab_size):
    rows = ENTROPY_ROWS if vocab_size < MAX_TILE else 40
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    whole_A = entropy_of(logits)
    for num_shards in (2, 4, 8):
        assert torch.equal(entropy_of(logits, num_shards), whole_A)


def test_an_entropy_has_its_bits_in_every_packing_of_the_head_batch_invariant():
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(409, 128, generator=generator), torch.randn(128, 128)
    targets_A = torch.zeros(409, dtype=torch.int64)
    with batch_invariant(True, "cpu"):
        whole = token_logprobs(hidden, weight, targets_A, 1.0, None, ((98, 128),))
        for first, last in pairwise([0, 1, 2, 5, 21, 22, 150, 408, 409]):
            part = token_logprobs(
                hidden[first:last], weight, targets_A[first:last], 1.0, None, ((98, 128),)
            )
            assert torch.equal(part.entropy_A, whole.entropy_A[first:last])
            assert torch.equal(part.logprobs_A, whole.logprobs_A[first:last])


def test_without_entropy_the_scores_have_the_same_bits():
    logits = torch.randn(50, 128, generator=torch.Generator().manual_seed(2))
    edges = [0, *(last for _, last in vocab_tiles(128))]
    found = [
        score_tiles([(edges, logits)], torch.arange(50), 0.9, None, with_entropy=with_entropy)
        for with_entropy in (False, True)
    ]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
