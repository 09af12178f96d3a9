"""Our Qwen3 against `transformers`' on random checkpoints, and its parts against plain float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_qwen3 import CPU, MAX_LENGTH, Variant, load_role, packed, random_sequences
from tiny_qwen3 import save_checkpoint as save

from mesh.invariant.switch import batch_invariant
from mesh.model.attention import AttentionContext, KVCache, attention
from mesh.model.layers import rotate, rotate_both
from mesh.model.logprobs import token_logprobs
from mesh.model.policy import named_weights
from mesh.model.rope import rope_table
from mesh.model.vocabulary import MAX_TILE, vocab_products, vocab_tiles

VARIANTS = [
    Variant(0, tied=True, kv_heads=2),
    Variant(1, tied=False, kv_heads=2, theta=1e4),
    Variant(2, tied=True, kv_heads=4),
    Variant(3, tied=False, kv_heads=4, vocab_size=97),
]


def named(variant: Variant) -> str:
    return f"{'tied' if variant.tied else 'untied'}-{variant.heads}/{variant.kv_heads}"


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, solo_mesh, variant):
    theirs = save(tmp_path, variant)
    model, shape = load_role(tmp_path, solo_mesh)
    assert shape.tied == variant.tied and shape.rope_theta == variant.theta
    for sequence in random_sequences([1, 2, 40, MAX_LENGTH]):
        batch = packed([sequence])
        hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.context)
        expected_TV = theirs(torch.tensor([sequence])).logits[0]
        assert expected_TV.std() > 0.5
        logits_TV = hidden_TD @ model.lm_head.weight.T
        torch.testing.assert_close(logits_TV, expected_TV, rtol=1e-5, atol=3e-5)


@torch.no_grad()
def test_packed_sequences_are_what_each_is_alone(tmp_path, solo_mesh):
    save(tmp_path, VARIANTS[0])
    model, _ = load_role(tmp_path, solo_mesh)
    sequences = random_sequences([17, 1, 30, 2, 30])
    together = packed(sequences)
    hidden_TD = model.hidden(together.tokens_T, together.positions_T, together.context)
    for sequence, hidden in zip(sequences, hidden_TD.split(together.lengths), strict=True):
        alone = packed([sequence])
        expected = model.hidden(alone.tokens_T, alone.positions_T, alone.context)
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_model_scores_targets_as_transformers_does(tmp_path, solo_mesh):
    theirs = save(tmp_path, VARIANTS[1])
    model, _ = load_role(tmp_path, solo_mesh)
    sequences, temperature = random_sequences([9, 25]), 0.7
    logits = [theirs(torch.tensor([s])).logits[0, :-1].double() / temperature for s in sequences]
    expected_AV = torch.cat(logits).log_softmax(-1)
    batch = packed(sequences)
    logprobs_A, entropy_A = batch.scores(model, temperature)
    picked_A = expected_AV.gather(1, batch.targets_A[:, None])[:, 0]
    torch.testing.assert_close(logprobs_A.double(), picked_A, rtol=1e-5, atol=3e-5)
    expected_A = -(expected_AV.exp() * expected_AV).sum(-1)
    torch.testing.assert_close(entropy_A.double(), expected_A, rtol=1e-5, atol=3e-5)


def scored(vocab_size: int, temperature: float):
    """Our scores and gradients, then autograd's of the plain formula in float64."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(13, 24, generator=generator)
    weight = torch.randn(vocab_size, 24, generator=generator) * 0.5
    targets = torch.randint(vocab_size, (13,), generator=generator)
    targets[:2] = torch.tensor([0, vocab_size - 1])
    upstream = torch.randn(13, generator=generator)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    logprobs, entropy = token_logprobs(*ours, targets, temperature)
    logprobs.backward(upstream)
    plain = [x.double().requires_grad_() for x in (hidden, weight)]
    scores = (plain[0] @ plain[1].T / temperature).log_softmax(-1)
    picked = scores.gather(1, targets[:, None])[:, 0]
    picked.backward(upstream.double())
    expected_entropy = -(scores.exp() * scores).sum(-1)
    return (
        [logprobs, entropy, *(x.grad for x in ours)],
        [picked, expected_entropy, *(x.grad for x in plain)],
    )


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("vocab_size", [5, 130, 4 * 3000, MAX_TILE + 1])
def test_token_logprobs_and_gradients_against_float64(vocab_size, temperature):
    ours, expected = scored(vocab_size, temperature)
    for value, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=2e-5, atol=2e-5)


def test_token_logprobs_of_extreme_logits_are_finite():
    hidden, weight = torch.tensor([[300.0]]), torch.linspace(-1, 1, 8)[:, None]
    scores = token_logprobs(hidden, weight, torch.tensor([0]), 0.5)
    torch.testing.assert_close(scores.logprobs_A, torch.tensor([-1200.0]))
    assert scores.entropy_A.item() == pytest.approx(0.0, abs=1e-4)


@given(vocab_size=st.integers(1, 600_000), shards=st.sampled_from([1, 2, 4]))
def test_tiles_of_shards_are_the_tiles_of_the_whole(vocab_size, shards):
    whole = vocab_tiles(vocab_size)
    assert whole[0][0] == 0 and whole[-1][1] == vocab_size
    assert all(0 < last - first <= MAX_TILE for first, last in whole)
    assert all(a[1] == b[0] for a, b in zip(whole, whole[1:], strict=False))
    if vocab_size % shards:
        with pytest.raises(ValueError, match=f"{vocab_size} cannot be split into {shards}"):
            vocab_tiles(vocab_size, shards)
        return
    width, local = vocab_size // shards, vocab_tiles(vocab_size, shards)
    joined = [(r * width + a, r * width + b) for r in range(shards) for a, b in local]
    assert joined == list(whole)


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("vocab_size", [128, MAX_TILE, MAX_TILE + 8, 151936])
def test_products_cover_the_tiles_and_are_alike_on_every_mesh(vocab_size, shards, switch):
    rows, tiles = vocab_size // shards, vocab_tiles(vocab_size, shards)
    with batch_invariant(switch, "cpu"):
        products = vocab_products(rows, shards)
    assert [pair for edges in products for pair in pairwise(edges)] == list(tiles)
    assert len(products) == (1 if vocab_size <= MAX_TILE else len(tiles))


@pytest.mark.parametrize("head_dim", [32, 128])
def test_a_longer_rope_table_begins_with_the_bits_of_a_shorter_one(head_dim):
    """Which a resumed run with a longer context counts on."""
    longest = rope_table(head_dim, 5000, 1e6, CPU)
    for length in (1, 2, 7, 31, 32, 33, 255, 1000, 4096, 4999):
        assert torch.equal(rope_table(head_dim, length, 1e6, CPU), longest[:length])


def test_the_rope_table_holds_cosines_then_sines_of_positions_times_frequencies():
    table = rope_table(6, 50, 100.0, CPU).double()
    frequencies = torch.tensor([100.0 ** -(2 * i / 6) for i in range(3)] * 2, dtype=torch.float64)
    angles = torch.arange(50)[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(table, expected, rtol=0, atol=5e-6)


def test_rotation_turns_pairs_by_the_angle_of_their_position():
    head_dim, positions = 8, torch.tensor([0, 3, 77])
    table = rope_table(head_dim, 100, 1e4, CPU)
    x_TNH = torch.randn(3, 2, head_dim, generator=torch.Generator().manual_seed(0))
    out = torch.view_as_complex(
        torch.stack(rotate(x_TNH, table[positions]).double().chunk(2, -1), -1)
    )
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    turn = torch.polar(torch.ones(()).double(), positions[:, None, None] * frequencies)
    pairs = torch.view_as_complex(torch.stack(x_TNH.double().chunk(2, -1), -1))
    torch.testing.assert_close(out, pairs * turn, rtol=0, atol=1e-5)


def test_queries_and_keys_are_rotated_as_each_alone():
    generator, table = torch.Generator().manual_seed(0), rope_table(8, 20, 1e4, CPU)[3:8]
    both = [torch.randn(1, 5, heads, 8, generator=generator) for heads in (4, 2)]
    upstream = [torch.randn(x.shape, generator=generator) for x in both]
    found, expected = ([x.clone().requires_grad_() for x in both] for _ in range(2))
    rotated = rotate_both(*found, table)
    torch.autograd.backward(rotated, upstream)
    for x, out, alone, grad in zip(found, rotated, expected, upstream, strict=True):
        turned = rotate(alone, table)
        turned.backward(grad)
        assert torch.equal(out, turned) and torch.equal(x.grad, alone.grad)


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("page_size", [16, 24])
def test_decode_steps_attend_to_their_pages_with_the_bits_of_padded_queries(switch, page_size):
    """The last row has no token, as those that pad a captured batch."""
    draw, lengths = torch.Generator().manual_seed(0), torch.tensor([1, 7, 330, 33, 0])
    width = -(-330 // page_size)
    pages = torch.randperm(5 * width, generator=draw).view(5, width).int() + 1
    keys, values = (torch.randn(5 * width + 1, page_size, 2, 8, generator=draw) for _ in range(2))
    last = (lengths - 1).clamp(min=0)
    slots = pages.gather(1, last[:, None] // page_size)[:, 0] * page_size + last % page_size
    starts = torch.tensor([0, 1, 2, 3, 4, 4]).int()
    cache = KVCache([keys], [values])
    context = AttentionContext(starts, lengths.int(), 1, 330, cache, pages, slots)
    tokens = [torch.randn(5, heads, 8, generator=draw) for heads in (4, 2, 2)]
    with batch_invariant(switch, "cpu"):
        found = attention(*tokens, context, 0, 0.3)
        padding = replace(context, max_query=2, slots_T=slots[:4])
        expected = attention(*(x[:4] for x in tokens), padding, 0, 0.3)
    assert found.isfinite().all()
    assert not switch or torch.equal(found[:4], expected)
    torch.testing.assert_close(found[:4], expected)
    for row, length in enumerate(lengths[:4].tolist()):
        k, v = (
            x[pages[row]].flatten(0, 1)[:length].repeat_interleave(2, 1) for x in (keys, values)
        )
        weights = (torch.einsum("nh,knh->nk", tokens[0][row], k) * 0.3).softmax(-1)
        torch.testing.assert_close(found[row], torch.einsum("nk,knh->nh", weights, v))


def test_activation_checkpointing_recomputes_and_gives_the_same_gradients(tmp_path, solo_mesh):
    save(tmp_path, VARIANTS[0])
    batch = packed(random_sequences([20, 7]))
    gradients, norms_run = {}, dict.fromkeys(("none", "selective", "full"), 0)

    def count(mode: str) -> None:
        norms_run[mode] += 1

    for mode in ("none", "selective", "full"):
        fsdp = {"compute_dtype": torch.float32, "activation_checkpointing": mode}
        model, _ = load_role(tmp_path, solo_mesh, fsdp=fsdp)
        model.layers["1"].ffn_norm.register_forward_pre_hook(lambda *_, mode=mode: count(mode))
        batch.scores(model).logprobs_A.sum().backward()
        weights = named_weights(model)
        gradients[mode] = {name: x.grad.full_tensor() for name, x in weights.items()}
    assert norms_run == {"none": 1, "selective": 2, "full": 2}
    assert all(gradient.abs().max() > 0 for gradient in gradients["none"].values())
    for mode in ("selective", "full"):
        for name, gradient in gradients["none"].items():
            torch.testing.assert_close(gradients[mode][name], gradient, rtol=1e-5, atol=1e-5)
