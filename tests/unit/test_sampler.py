"""Sampling: keys against a hash in plain integers, noise and draws against distributions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mesh.engine.choice import choose
from mesh.engine.sampler import draw, gumbel, token_keys, truncated
from mesh.model.vocabulary import MASKED
from mesh.types import Sampling

SAMPLING = Sampling(temperature=1.0, max_new_tokens=8, seed=7, step=3)
MASK64, MASK32 = (1 << 64) - 1, (1 << 32) - 1


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def key_of(*fields: int) -> int:
    """The key as the unsigned integer that the definition gives."""
    key = fields[0] & MASK64
    for field in fields[1:]:
        key = splitmix64(key) ^ (field & MASK64)
    return splitmix64(key)


def keys_of(rows: list[tuple[int, int, int]], sampling: Sampling = SAMPLING) -> torch.Tensor:
    """token_keys of (prompt_id, sample_id, position) rows."""
    table = torch.tensor(rows)
    return token_keys(sampling, table[:, :2], table[:, 2])


def many_keys(count: int, seed: int = 0) -> torch.Tensor:
    return keys_of([(0, 0, i) for i in range(count)], replace(SAMPLING, seed=seed))


def drawn(logits_SV: torch.Tensor, keys_S: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    return draw(truncated(logits_SV, sampling), keys_S, sampling)


def test_token_keys_have_these_bits_for_ever():
    rows = [(0, 0, 0), (5, 1, 2), (2**31, 255, 2047)]
    golden = [-7680090553777233484, -8748269730083764457, -7622235129378108318]
    assert keys_of(rows).tolist() == golden
    held_out = replace(SAMPLING, seed=2**40, step=-1)
    assert keys_of(rows[1:2], held_out).tolist() == [-5293780700798734563]


def test_token_keys_are_the_hash_of_all_five_fields():
    for seed, step, prompt, sample, position in [
        (7, 3, 5, 1, 2),
        (0, 0, 0, 0, 0),
        (9, -1, 1, 2, 3),
    ]:
        sampling = replace(SAMPLING, seed=seed, step=step)
        (key,) = keys_of([(prompt, sample, position)], sampling).tolist()
        assert key & MASK64 == key_of(seed, step, prompt, sample, position)


def test_keys_differ_in_every_field_and_in_their_order():
    keys = set()
    for seed in range(4):
        for step in range(-1, 3):
            rows = [(p, s, i) for p in range(4) for s in range(4) for i in range(4)]
            keys |= set(keys_of(rows, replace(SAMPLING, seed=seed, step=step)).tolist())
    assert len(keys) == 4**5


def murmur3(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def inverse_murmur3(x: int) -> int:
    x ^= x >> 16
    x = x * pow(0xC2B2AE35, -1, 1 << 32) & MASK32
    x ^= (x >> 13) ^ (x >> 26)
    x = x * pow(0x85EBCA6B, -1, 1 << 32) & MASK32
    return x ^ (x >> 16)


def bits_of(key: int, entry: int) -> int:
    """The 32 random bits of a vocabulary entry: the more there are, the less the noise."""
    inner = murmur3((key & MASK32) ^ (entry * 0x9E3779B1 & MASK32))
    return murmur3(inner ^ ((key & MASK64) >> 32))


def key_with(bits: int, entry: int) -> torch.Tensor:
    """A key that gives `entry` these random bits."""
    high = murmur3(entry * 0x9E3779B1 & MASK32) ^ inverse_murmur3(bits)
    key = high << 32
    assert bits_of(key, entry) == bits
    return torch.tensor([key - (1 << 64) if key >= 1 << 63 else key])


def test_a_flat_distribution_is_won_by_the_entry_with_the_fewest_bits():
    keys_S = many_keys(20)
    tokens = draw(torch.zeros(20, 500), keys_S, SAMPLING).tolist()
    expected = [min(range(500), key=lambda v, k=k: bits_of(k, v)) for k in keys_S.tolist()]
    assert tokens == expected
    assert tokens[:6] == [355, 316, 265, 192, 455, 90]


@pytest.mark.parametrize("bits", [0, 1, (1 << 24) - 999, 1 << 24, 1 << 31, MASK32 - 1, MASK32])
def test_noise_of_any_bits_is_the_gumbel_quantile_and_finite(bits):
    uniform = (bits + 0.5) / 2**32
    (noise,) = gumbel(key_with(bits, 3), 3, 4)[0].tolist()
    # the losing end is coarse in fp32: any value there loses
    tolerance = 1e-4 if uniform < 0.9 else 0.7
    assert noise == pytest.approx(-math.log(-math.log1p(-uniform)), abs=tolerance)


@pytest.mark.parametrize("bits", [0, MASK32])
def test_truncated_entries_lose_against_any_noise(bits):
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    only = replace(SAMPLING, top_k=1)
    assert drawn(logits, key_with(bits, 3), only).tolist() == [3]


def test_noise_has_the_moments_and_the_tail_of_gumbels_distribution():
    noise = gumbel(many_keys(2000), 0, 1000).double().flatten()
    count = len(noise)
    variance = math.pi**2 / 6
    # six standard errors; the fourth central moment of a Gumbel is 3 pi^4 / 20
    assert abs(noise.mean() - 0.5772156649) < 6 * math.sqrt(variance / count)
    spread = math.sqrt((3 * math.pi**4 / 20 - variance**2) / count)
    assert abs(noise.var() - variance) < 6 * spread
    for threshold in (-2.0, 0.0, 3.0, 6.0, 9.0):
        share = -math.expm1(-math.exp(-threshold))
        seen = (noise > threshold).sum().item()
        assert abs(seen - share * count) < 6 * math.sqrt(share * (1 - share) * count)


def test_noise_of_neighbours_is_uncorrelated():
    noise = gumbel(many_keys(1000), 0, 1000).double()
    noise = (noise - noise.mean()) / noise.std()
    for product in (noise[:, 1:] * noise[:, :-1], noise[1:] * noise[:-1]):
        assert abs(product.mean()) < 6 / math.sqrt(product.numel())


def test_noise_does_not_depend_on_the_slice_or_the_rows_it_is_computed_for():
    keys_S = many_keys(6)
    whole = gumbel(keys_S, 0, 1003)
    edges = [0, 1, 17, 500, 1003]
    slices = [gumbel(keys_S, a, b) for a, b in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(slices, dim=1), whole)
    rows = torch.cat([gumbel(keys_S[i : i + 1], 0, 1003) for i in range(6)])
    assert torch.equal(rows, whole)


def chi_square(tokens_S: torch.Tensor, probability_V: torch.Tensor) -> float:
    """Pearson's statistic over the entries that can be drawn; others must not be."""
    counts_V = torch.bincount(tokens_S, minlength=len(probability_V)).double()
    assert counts_V[probability_V == 0].sum() == 0
    expected_V = probability_V[probability_V > 0] * len(tokens_S)
    assert expected_V.min() > 5
    return float(((counts_V[probability_V > 0] - expected_V) ** 2 / expected_V).sum())


def reference_truncate(logits: list[float], top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities after top_k, then top_p, in float64, by a plain loop."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))[: top_k or None]
    weights = {v: math.exp(logits[v]) for v in order}
    total, mass, kept = sum(weights.values()), 0.0, []
    for v in order:
        if top_p < 1.0 and mass >= top_p:
            break
        kept.append(v)
        mass += weights[v] / total
    probability_V = torch.zeros(len(logits), dtype=torch.float64)
    for v in kept:
        probability_V[v] = weights[v] / sum(weights[u] for u in kept)
    return probability_V


LOGITS = torch.randn(12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.8), (99, 1.0)])
def test_draws_follow_the_softmax_of_what_is_kept(top_k, top_p):
    count = 20_000
    sampling = replace(SAMPLING, top_k=top_k, top_p=top_p)
    tokens_S = drawn(LOGITS.repeat(count, 1), many_keys(count, seed=11), sampling)
    probability_V = reference_truncate(LOGITS.tolist(), top_k, top_p)
    freedom = int((probability_V > 0).sum()) - 1
    assert chi_square(tokens_S, probability_V) < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(5, 1.0, 0.7), (0, 0.8, 1.3), (9, 0.9, 1.0)]
)
def test_truncated_logprobs_are_those_of_200000_draws(top_k, top_p, temperature):
    """What is recorded with a token is the log of how often it is drawn; the likeliest two ids are
    without a text."""
    count = 200_000
    sampling = replace(
        SAMPLING, top_k=top_k, top_p=top_p, temperature=temperature, truncated_logprobs=True
    )
    logits_V = torch.cat([torch.full((2,), 9.0), LOGITS])
    tokens_S, logprobs_S = choose(
        logits_V.repeat(count, 1), many_keys(count, seed=12), sampling, None, ((0, 2),)
    )
    kept_V = reference_truncate((LOGITS / temperature).tolist(), top_k, top_p)
    probability_V = torch.cat([torch.zeros(2).double(), kept_V])
    freedom = int((probability_V > 0).sum()) - 1
    assert 1 < freedom < len(LOGITS) - 1, "control: some ids are cut off, and several are left"
    assert chi_square(tokens_S, probability_V) < freedom + 5 * math.sqrt(2 * freedom)
    torch.testing.assert_close(
        logprobs_S.double(), probability_V[tokens_S].log(), rtol=0, atol=1e-6
    )


def test_draws_of_one_position_are_independent_of_the_next():
    """Pairs of tokens of neighbouring positions fill the product distribution."""
    keys_S = keys_of([(p, s, i) for p in range(100) for s in range(100) for i in range(2)])
    tokens_S2 = draw(LOGITS[:4].repeat(len(keys_S), 1), keys_S, SAMPLING).view(-1, 2)
    probability_V = LOGITS[:4].double().softmax(0)
    pairs = tokens_S2[:, 0] * 4 + tokens_S2[:, 1]
    product = (probability_V[:, None] * probability_V).flatten()
    assert chi_square(pairs, product) < 15 + 5 * math.sqrt(30)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (0, 0.05), (0, 0.9), (6, 0.6), (50, 0.999)]
)
def test_truncation_keeps_what_a_plain_loop_keeps(top_k, top_p):
    logits_SV = torch.randn(40, 30, generator=torch.Generator().manual_seed(2)) * 2
    kept_SV = truncated(logits_SV, replace(SAMPLING, top_k=top_k, top_p=top_p))
    for logits, kept in zip(logits_SV, kept_SV, strict=True):
        expected = reference_truncate(logits.tolist(), top_k, top_p) > 0
        assert torch.equal(kept > MASKED, expected)
        assert torch.equal(kept[expected], logits[expected])


def test_ties_at_the_edge_go_to_the_lower_id():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 3.0]])
    three, half = replace(SAMPLING, top_k=3), replace(SAMPLING, top_p=0.5)
    assert (truncated(logits, three) > MASKED).tolist()[0] == [0, 1, 1, 0, 0, 1]
    flat = torch.zeros(1, 8)
    assert (truncated(flat, half) > MASKED).tolist()[0] == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_greedy_takes_the_likeliest_and_of_equals_the_first(truncation):
    greedy = replace(SAMPLING, temperature=0.0, **truncation)
    logits_SV = torch.randn(50, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn(logits_SV, many_keys(50), greedy), logits_SV.argmax(-1))
    tied = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    assert drawn(tied, many_keys(1), greedy).tolist() == [1]


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.8}])
def test_a_token_does_not_depend_on_its_batch_or_its_row(truncation):
    sampling = replace(SAMPLING, **truncation)
    logits_SV = torch.randn(64, 100, generator=torch.Generator().manual_seed(4)) * 2
    keys_S = many_keys(64)
    together = drawn(logits_SV, keys_S, sampling)
    alone = [drawn(logits_SV[i : i + 1], keys_S[i : i + 1], sampling).item() for i in range(64)]
    assert together.tolist() == alone
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn(logits_SV[order], keys_S[order], sampling), together[order])
    assert len(set(alone)) > 20


def test_the_draws_leave_the_logits_alone():
    logits_SV = torch.randn(3, 10)
    before = logits_SV.clone()
    drawn(logits_SV, many_keys(3), replace(SAMPLING, top_k=2, top_p=0.5))
    assert torch.equal(logits_SV, before)
