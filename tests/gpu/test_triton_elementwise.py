"""The Triton versions of RoPE, SwiGLU, the tiles' scores and the draw against the plain functions.

Without a GPU, Triton's interpreter runs the kernels (fp32, as it computes no bf16); it is switched
on for a process of its own, since it replaces every kernel that is defined while it is on. To be
quick, that process does not import torchtitan, and leaves what needs it to this one.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mesh.engine.sampler import draw
from mesh.invariant.switch import batch_invariant
from mesh.model import logprobs
from mesh.model.divergence import HeadInputs, combine_divergence, plain_tile_divergence
from mesh.model.logprobs import score_tiles, taught_logprobs, token_logprobs
from mesh.model.tile_gradient import DivergenceTerm, EntropyTerm, plain_tile_gradient
from mesh.model.tiles import plain_combine_scores, plain_tile_scores
from mesh.model.vocabulary import mask_ids, vocab_tiles
from mesh.types import Sampling

ROWS = (1, 2, 3, 7, 8, 16, 31, 33, 64, 129, 256, 257)
EDGES = (0, 2500, 2501, 4548, 9000, 9100)  # tiles of one lane, of less than a block, and of several
TEXTLESS = ((0, 2500), (2600, 2700), (4548, 9000))  # the first tile, a hole, and another tile
TEMPERATURE = 0.7
HEADS = [(3, 1, 24), (4, 2, 64)]
TOKENS = 5


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


def gradients(function, tensors: list[torch.Tensor], out_grads: list[torch.Tensor]) -> tuple:
    """(outputs, gradients) of `function`, which gives one tensor or several."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outs = function(*leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    return outs, torch.autograd.grad(outs, leaves, out_grads)


def rotation_inputs(heads: int, kv_heads: int, head_dim: int, device: str, dtype: torch.dtype):
    """(q, k), views of one fused projection; their gradients, one strided; and rope_TE."""
    fused = normal(1, TOKENS, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    q, k, _ = fused.split([heads, kv_heads, kv_heads], 2)
    grads = [normal(*x.shape, seed=s, device=device).to(dtype) for s, x in enumerate((q, k), 1)]
    grads[1] = grads[1].transpose(1, 2).contiguous().transpose(1, 2)
    angles = 9 * normal(TOKENS, head_dim // 2, seed=3, device=device)
    parts = (angles.cos(), angles.cos(), angles.sin(), angles.sin())
    return [q, k], grads, torch.cat(parts, -1)


def rotations(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict:
    """Outputs and gradients; are the outputs of one token alone the same?"""
    from mesh.model.triton_elementwise import rotate_both

    pair, grads, rope_TE = rotation_inputs(*shape, device, dtype)
    outs, found = gradients(lambda q, k: rotate_both(q, k, rope_TE), pair, grads)
    alone = rotate_both(*(x[:, 2:3] for x in pair), rope_TE[2:3])
    equal = [torch.equal(a, b[:, 2:3]) for a, b in zip(alone, outs, strict=True)]
    return {"outs": outs, "gradients": found, "alone": equal}


def gating_inputs(device: str, dtype: torch.dtype):
    """(gate, up), the gate transposed, and the gradient."""
    gate = (3 * normal(83, 37, device=device)).to(dtype).t()
    return [gate, normal(37, 83, seed=1, device=device).to(dtype)], [
        normal(37, 83, seed=2, device=device).to(dtype)
    ]


def gatings(device: str, dtype: torch.dtype) -> dict:
    """Output and gradients; is the output of one row alone the same?"""
    from mesh.model.triton_elementwise import swiglu

    pair, grads = gating_inputs(device, dtype)
    outs, found = gradients(swiglu, pair, grads)
    alone = swiglu(*(x[1:2] for x in pair))
    return {"all": [*outs, *found], "alone": [torch.equal(alone, outs[0][1:2])]}


def tile_inputs(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with rows further apart than they are long, and targets in and out of their tiles."""
    logits = 6 * normal(4, EDGES[-1] + 7, device=device)[:, : EDGES[-1]]
    return logits.to(dtype), torch.tensor([2500, EDGES[-1] - 1, EDGES[-1], -1], device=device)


def exact_scores(logits: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """`tile_scores` by its definition, in float64: each of the three as [K, A]."""
    found = []
    for first, last in pairwise(EDGES):
        z = logits[:, first:last].double() / TEMPERATURE
        picked = [
            z[row, target - first].item() if first <= target < last else -math.inf
            for row, target in enumerate(targets.tolist())
        ]
        picked = z.new_tensor(picked)
        found.append((z.logsumexp(-1), picked, (z.softmax(-1) * z).sum(-1)))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def exact_combined(logits: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Logprob, entropy and log-sum-exp over the whole vocabulary in float64."""
    z = logits.double() / TEMPERATURE
    logprobs_AV = z.log_softmax(-1)
    entropy = -(logprobs_AV.exp() * logprobs_AV).sum(-1)
    picked = [
        logprobs_AV[row, target].item() if 0 <= target < EDGES[-1] else -math.inf
        for row, target in enumerate(targets.tolist())
    ]
    return [z.new_tensor(picked), entropy, z.logsumexp(-1)]


def tilings(device: str, dtype: torch.dtype) -> dict:
    """Errors of the scores of all tiles in one launch, by score, and of what they combine to. Then
    whether the scores' bits are those without moments, of each tile as a tensor of its own, and of
    each row alone.
    """
    from mesh.model.triton_scores import combine_scores, tile_scores

    logits, targets = tile_inputs(device, dtype)
    ours = tile_scores(logits, EDGES, targets, TEMPERATURE, True)
    bare = tile_scores(logits, EDGES, targets, TEMPERATURE, False)
    equal = [torch.equal(bare[:, :2], ours[:, :2])]
    for tile, (first, last) in enumerate(pairwise(EDGES)):
        part = logits[:, first:last].contiguous()  # another stride and alignment
        alone = tile_scores(part, (first, last), targets, TEMPERATURE, True)
        equal.append(torch.equal(alone[0], ours[tile]))
    for row in (1, 3):
        span = slice(row, row + 1)
        alone = tile_scores(logits[span].clone(), EDGES, targets[span], TEMPERATURE, True)
        equal.append(torch.equal(alone, ours[..., span]))
    pairs = [*zip(ours.unbind(1), exact_scores(logits, targets), strict=True)]
    pairs += zip(combine_scores(ours, True), exact_combined(logits, targets), strict=True)
    bare_ones = combine_scores(bare, False)
    single = combine_scores(ours[:1], True)  # one tile: its own log-sum-exp
    return {
        "infinite": [torch.equal(a.isneginf(), b.isneginf()) for a, b in pairs],
        "errors": [error(a[b.isfinite()], b[b.isfinite()]) for a, b in pairs],
        "equal": [*equal, torch.equal(single[2], ours[0, 0]), not bare_ones[1].any().item()],
    }


def tile_gradients(device: str, dtype: torch.dtype) -> list[float]:
    """Errors of the gradient of each tile's logits, against its definition in float64."""
    from mesh.model.triton_scores import tile_gradient

    logits, targets = tile_inputs(device, dtype)
    scale = normal(4, seed=3, device=device)
    z = logits.double() / TEMPERATURE
    held = targets[:, None] == torch.arange(EDGES[-1], device=device)
    exact = (held.double() - z.softmax(-1)) * scale.double()[:, None]
    found = []
    for first, last in pairwise(EDGES):
        part, lse = logits[:, first:last].clone(), z.logsumexp(-1).float()
        ours = tile_gradient(part, first, targets, lse, scale, TEMPERATURE)
        found.append(error(ours, exact[:, first:last]))
    return found


def taught_inputs(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits of a policy and of a teacher, whose rows are further apart, with masked ids; targets;
    factors of the three gradients."""
    ours = 3 * normal(4, EDGES[-1] + 7, device=device)[:, : EDGES[-1]]
    theirs = 3 * normal(4, EDGES[-1] + 70, seed=1, device=device)[:, : EDGES[-1]]
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    for logits in (ours, theirs):
        mask_ids(logits, TEXTLESS, 0)
    targets = torch.tensor([2500, 2599, 9000, EDGES[-1] - 1], device=device)
    return ours, theirs, targets, *(normal(4, seed=s, device=device) for s in (3, 4, 5))


def teachings(device: str, dtype: torch.dtype) -> dict:
    """Errors of divergences, teachers' log-sum-exps and gradients against float64; the largest
    gradient of a masked id. Then whether bits are those of each tile as a tensor of its own, of
    each row alone, and those of the gradient without the terms, where their factors are 0.
    """
    from mesh.model.triton_scores import combine_scores, tile_divergence, tile_gradient, tile_scores

    ours, theirs, targets, *scales = taught_inputs(device, dtype)
    taught = tile_divergence(ours, theirs, EDGES, TEMPERATURE)
    equal = []
    for tile, edges in enumerate(pairwise(EDGES)):
        parts = [x[:, slice(*edges)].contiguous() for x in (ours, theirs)]
        equal.append(torch.equal(tile_divergence(*parts, edges, TEMPERATURE)[0], taught[tile]))
    for row in (slice(1, 2), slice(3, 4)):
        alone = tile_divergence(ours[row].clone(), theirs[row].clone(), EDGES, TEMPERATURE)
        equal.append(torch.equal(alone, taught[..., row]))
    scores = tile_scores(ours, EDGES, targets, TEMPERATURE, True)
    _, entropy, lse = combine_scores(scores, True)
    divergence, teacher_lse = combine_divergence(scores[:, 0], taught, lse)
    z = (ours.double() / TEMPERATURE).requires_grad_()
    p, q = z.log_softmax(-1), (theirs.double() / TEMPERATURE).log_softmax(-1)
    exact = [
        p.gather(1, targets[:, None])[:, 0],
        -(p.exp() * p).sum(-1),
        (p.exp() * (p - q)).sum(-1),
    ]
    (right,) = torch.autograd.grad(exact, z, [x.double() for x in scales])
    nothing = torch.zeros_like(lse)

    def gradient(rows: slice, by: tuple, with_terms: bool = True) -> torch.Tensor:
        """Over all tiles, each a tensor of its own."""
        found = []
        for first, last in pairwise(EDGES):
            part, other = (x[rows, first:last].clone() for x in (ours, theirs))
            terms = (
                EntropyTerm(entropy[rows], by[1][rows]),
                DivergenceTerm(other, teacher_lse[rows], divergence[rows], by[2][rows]),
            )
            given = (part, first, targets[rows], lse[rows], by[0][rows], TEMPERATURE)
            found.append(tile_gradient(*given, *(terms if with_terms else ())))
        return torch.cat(found, -1)

    rows = slice(0, 4)
    whole, bare = gradient(rows, scales), gradient(rows, scales, False)
    unused = gradient(rows, (scales[0], nothing, nothing))
    equal += [torch.equal(gradient(row, scales), whole[row]) for row in (slice(1, 2), slice(2, 4))]
    known = torch.ones(EDGES[-1], dtype=torch.bool, device=device)
    for first, last in TEXTLESS:
        known[first:last] = False
    pairs = [(divergence, exact[2]), (teacher_lse, (theirs.double() / TEMPERATURE).logsumexp(-1))]
    return {
        "errors": [error(a.detach(), b.detach()) for a, b in pairs],
        "gradient": error(whole, right),
        "masked gradient": whole[:, ~known].abs().max().item(),
        "equal": [*equal, torch.equal(unused, bare)],
    }


def draws(device: str, dtype: torch.dtype) -> list[list[int]]:
    """Tokens by the kernel of undivided logits and of divided ones, then by the plain function."""
    from mesh.engine.kernels import draw_shard

    logits = (3 * normal(8, 5000, device=device)).to(dtype)
    keys = torch.randint(-(2**62), 2**62, (8,), generator=torch.Generator()).to(device)
    z = logits.float() / TEMPERATURE
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=1, seed=0, step=0)
    kernel = [draw_shard(x, keys, 0, True, by)[1] for x, by in ((logits, TEMPERATURE), (z, 1.0))]
    return [x.tolist() for x in (*kernel, draw(z.cpu(), keys.cpu(), sampling))]


def maskings(device: str, dtype: torch.dtype) -> dict:
    """Errors of logprobs, entropies and log-sum-exps with masked ids against those of the known
    ones in float64; gradients, as errors and the largest of a masked id; how many ids
    sampling and taking the likeliest draw, and how often a masked one.
    """
    from mesh.engine.kernels import draw_shard
    from mesh.model.triton_scores import combine_scores, tile_gradient, tile_scores

    known = torch.ones(EDGES[-1], dtype=torch.bool, device=device)
    logits = (6 * normal(4, EDGES[-1], device=device)).to(dtype)
    for first, last in TEXTLESS:
        known[first:last] = False
        logits[:, first:last] += 50
    mask_ids(logits, TEXTLESS, 0)
    targets = torch.tensor([2500, 2599, 9000, EDGES[-1] - 1], device=device)
    scores = tile_scores(logits, EDGES, targets, TEMPERATURE, True)
    logprobs, entropy, lse = combine_scores(scores, True)
    z = logits.double()[:, known] / TEMPERATURE
    picked = (logits.double() / TEMPERATURE).gather(1, targets[:, None])[:, 0] - z.logsumexp(-1)
    exact_entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    pairs = [(logprobs, picked), (entropy, exact_entropy), (lse, z.logsumexp(-1))]
    scale = normal(4, seed=3, device=device)
    found = torch.cat(
        [
            tile_gradient(logits[:, a:b].clone(), a, targets, lse, scale, TEMPERATURE)
            for a, b in pairwise(EDGES)
        ],
        -1,
    )
    held = (targets[:, None] == torch.arange(EDGES[-1], device=device))[:, known]
    exact = (held.double() - z.softmax(-1)) * scale.double()[:, None]
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator()).to(device)
    rows = logits.repeat(16, 1)
    drawn = [draw_shard(rows, keys, 0, noise, TEMPERATURE)[1] for noise in (True, False)]
    return {
        "errors": [error(a, b) for a, b in pairs],
        "gradient": error(found[:, known], exact),
        "masked gradient": found[:, ~known].abs().max().item(),
        "drawn": [len(set(tokens.tolist())) for tokens in drawn],
        "masked drawn": sum((~known[tokens]).sum().item() for tokens in drawn),
    }


def results(device: str, dtype: torch.dtype) -> dict:
    """What all the kernels come to."""
    return {
        "rotate": [rotations(shape, device, dtype) for shape in HEADS],
        "swiglu": gatings(device, dtype),
        "scores": tilings(device, dtype),
        "gradients": tile_gradients(device, dtype),
        "taught": teachings(device, dtype),
        "draws": draws(device, dtype),
        "maskings": maskings(device, dtype),
    }


def check_layers(found: dict, device: str, dtype: torch.dtype, tolerance: float) -> None:
    from mesh.model.layers import plain_swiglu, rotate

    for shape, turned in zip(HEADS, found["rotate"], strict=True):
        pair, grads, rope_TE = rotation_inputs(*shape, device, dtype)
        plain = gradients(lambda q, k, r=rope_TE: (rotate(q, r), rotate(k, r)), pair, grads)
        assert all(torch.equal(a, b) for a, b in zip(turned["outs"], plain[0], strict=True))
        errors = [error(a, b) for a, b in zip(turned["gradients"], plain[1], strict=True)]
        assert max(errors) < tolerance and turned["alone"] == [True, True]
    pair, grads = gating_inputs(device, dtype)
    wide = gradients(plain_swiglu, [x.double() for x in pair], [x.double() for x in grads])
    plain = gradients(plain_swiglu, pair, grads)
    exact = [*wide[0], *wide[1]]
    ours = [error(a, b) for a, b in zip(found["swiglu"]["all"], exact, strict=True)]
    theirs = [error(a, b) for a, b in zip([*plain[0], *plain[1]], exact, strict=True)]
    assert max(ours) < tolerance and found["swiglu"]["alone"] == [True]
    assert all(a < 1.2 * b + 1e-7 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def check_scores(found: dict, tolerance: float) -> None:
    scores = found["scores"]
    assert scores["infinite"] == [True] * 6, "a target is in the tile that holds it"
    *errors, entropy, logsumexp = scores["errors"]
    assert len(errors) == 4
    assert max(*errors, logsumexp) < 2e-6, "scores are fp32 whatever the logits are"
    assert entropy < 1e-4, "the difference of two numbers some hundred times as large"
    assert scores["equal"] == [True] * (1 + 5 + 2 + 2)
    assert len(found["gradients"]) == 5 and max(found["gradients"]) < 10 * tolerance
    taught = found["taught"]
    assert max(taught["errors"]) < 2e-6 and taught["masked gradient"] == 0.0
    assert taught["gradient"] < 10 * tolerance
    assert taught["equal"] == [True] * (5 + 2 + 2 + 1)
    undivided, divided, plain = found["draws"]
    assert undivided == divided == plain and len(set(plain)) > 5
    masked = found["maskings"]
    assert max(masked["errors"]) < 1e-4 and masked["gradient"] < 10 * tolerance
    assert masked["masked gradient"] == 0.0 and masked["masked drawn"] == 0
    assert masked["drawn"][0] > 10 and masked["drawn"][1] == 4


def test_the_kernels_in_the_interpreter(tmp_path: Path):
    path = tmp_path / "results.pt"
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(path)
    check_layers(found, "cpu", torch.float32, tolerance=1e-6)
    check_scores(found, tolerance=1e-6)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_on_cuda(dtype):
    found = results("cuda", dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    check_layers(found, "cuda", dtype, tolerance)
    check_scores(found, tolerance)


@needs_cuda
@pytest.mark.parametrize("temperature", [0.3, 0.7, 0.9, 1.0, 1.3])
def test_logits_are_divided_as_pytorch_divides(temperature):
    from mesh.model.triton_scores import inverse_of

    logits = normal(100_000, device="cuda")
    assert torch.equal(logits / temperature, logits * inverse_of(temperature))


def scored_inputs(vocab_size: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = normal(rows, 128, device="cuda"), normal(vocab_size, 128, device="cuda")
    targets = torch.randint(vocab_size, (rows,), generator=torch.Generator()).cuda()
    return hidden.bfloat16(), (weight / 4).bfloat16(), targets


@needs_cuda
@pytest.mark.parametrize("vocab_size", [151936, 1003, 96])
def test_scores_have_their_bits_in_every_batch_and_as_the_engine_takes_them(vocab_size):
    hidden, weight, targets = scored_inputs(vocab_size, 600)
    tiles = vocab_tiles(vocab_size)
    logits = torch.cat([F.linear(hidden, weight[slice(*tile)]) for tile in tiles], -1)
    edges = [0, *(last for _, last in tiles)]

    def scores(first: int, rows: int) -> list[torch.Tensor]:
        """As the trainer takes them, each tile a tensor of its own, then as the engine does."""
        span = slice(first, first + rows)
        part, wanted = logits[span].clone(), targets[span]
        pieces = [(tile, part[:, slice(*tile)].contiguous()) for tile in tiles]
        return [
            *score_tiles(pieces, wanted, 0.9, None, True)[::2],
            *score_tiles([(edges, part)], wanted, 0.9, None, False)[::2],
        ]

    logprobs_A, logsumexp_A, *others = scores(0, len(hidden))
    equal = [torch.equal(a, b) for a, b in zip(others, (logprobs_A, logsumexp_A), strict=True)]
    for rows in ROWS:
        parts = zip(scores(300, rows), (logprobs_A, logsumexp_A) * 2, strict=True)
        equal += [torch.equal(part, whole[300 : 300 + rows]) for part, whole in parts]
    assert equal == [True] * (2 + 4 * len(ROWS))


@needs_cuda
def test_token_logprobs_have_their_bits_in_every_batch():
    hidden, weight, targets = scored_inputs(151936, 600)
    where = (0.9, None, ((151_669, 151_936),))  # as a Qwen3's tokenizer
    with batch_invariant(True, "cuda"), torch.no_grad():
        whole = token_logprobs(hidden, weight, targets, *where)
        spans = [slice(300, 300 + rows) for rows in ROWS]
        parts = [token_logprobs(hidden[span], weight, targets[span], *where) for span in spans]
    equal = [torch.equal(part, all_[span])
             for found, span in zip(parts, spans, strict=True)
             for part, all_ in zip(found, whole, strict=True)]  # fmt: skip
    assert equal == [True] * (2 * len(ROWS))


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the plain functions in the place of the kernels."""
    from mesh.model import layers

    def rotate_both(*pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return layers.rotate(pair[0], pair[2]), layers.rotate(pair[1], pair[2])

    monkeypatch.setattr(logprobs, "tile_scores", plain_tile_scores)
    monkeypatch.setattr(logprobs, "combine_scores", plain_combine_scores)
    monkeypatch.setattr(logprobs, "tile_gradient", plain_tile_gradient)
    monkeypatch.setattr(logprobs, "tile_divergence", plain_tile_divergence)
    monkeypatch.setattr(layers, "swiglu", layers.plain_swiglu)
    monkeypatch.setattr(layers, "rotate_both", rotate_both)


@needs_cuda
def test_token_logprobs_and_their_gradients_are_the_plain_ones(monkeypatch):
    hidden, weight, targets = scored_inputs(9000, 64)

    def scored() -> tuple:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        scores = token_logprobs(*leaves, targets, 0.9)
        return *scores, *torch.autograd.grad(scores.logprobs_A.sum(), leaves)

    ours = scored()
    plainly(monkeypatch)
    plain = scored()
    errors = [error(a, b) for a, b in zip(ours, plain, strict=True)]
    assert errors[0] < 1e-5 and all(e < 1e-3 for e in errors[2:]), errors
    # entropies of sharp distributions are small differences of large numbers
    assert (ours[1] - plain[1]).abs().max() < 1e-4
    equal = [torch.equal(a, b) for a, b in zip(ours, plain, strict=True)]
    assert not all(equal), "control: other kernels, other roundings"


@needs_cuda
def test_entropies_and_divergences_have_the_plain_functions_gradients(monkeypatch):
    hidden, weight, targets = scored_inputs(9000, 64)
    teacher = HeadInputs(*(x.roll(1, 0) for x in (hidden, weight)))

    def scored() -> tuple:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        scores = taught_logprobs(*leaves, targets, 0.9, None, ((8000, 9000),), teacher)
        total = (scores.entropy_A + scores.divergence_A).sum()
        return *scores, *torch.autograd.grad(total, leaves)

    ours = scored()
    plainly(monkeypatch)
    plain = scored()
    errors = [error(a, b) for a, b in zip(ours, plain, strict=True)]
    assert errors[2] < 1e-4 and all(e < 2e-3 for e in errors[3:]), errors
    equal = [torch.equal(a, b) for a, b in zip(ours, plain, strict=True)]
    assert not all(equal), "control: other kernels, other roundings"


@needs_cuda
def test_taught_logprobs_have_their_bits_in_every_batch():
    hidden, weight, targets = scored_inputs(151936, 600)
    other, theirs, _ = scored_inputs(151936, 600)
    other = other.flip(0)

    def of(span: slice) -> tuple:
        leaf = hidden[span].detach().requires_grad_()
        teacher = HeadInputs(other[span], theirs)
        spans = ((151_669, 151_936),)
        scores = taught_logprobs(leaf, weight, targets[span], 0.9, None, spans, teacher)
        (grad,) = torch.autograd.grad(sum(x.sum() for x in scores), leaf)
        return *scores, grad

    with batch_invariant(True, "cuda"):
        whole = of(slice(0, 600))
        spans = [slice(300, 300 + rows) for rows in ROWS]
        equal = [torch.equal(a, b[span])
                 for span in spans for a, b in zip(of(span), whole, strict=True)]  # fmt: skip
    assert equal == [True] * (4 * len(ROWS))


@needs_cuda
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_model_has_the_plain_functions_gradients(checkpointing, solo_mesh, monkeypatch):
    from tiny_qwen3 import packed, random_sequences
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    from mesh.model.families import TINY
    from mesh.model.policy import build_policy, named_weights

    device = torch.device("cuda")
    model = build_policy(TINY, 128, device, torch.float32, solo_mesh)
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=index) / 8 + (parameter.ndim == 1))
    if checkpointing != "none":
        policy = {"full": FullAC, "selective": SelectiveAC}[checkpointing]
        policy(policy.Config()).apply(model)
    batch = packed(random_sequences([30, 9, 61], vocab_size=TINY.vocab_size))
    tensors = (batch.tokens_T, batch.positions_T, batch.index_A, batch.targets_A)
    tokens, positions, index, targets = (x.cuda() for x in tensors)

    def trained() -> list[torch.Tensor]:
        context = batch.context
        context.cu_seqlens, context.lengths = context.cu_seqlens.cuda(), context.lengths.cuda()
        scores = model(tokens, positions, context, index, targets, 1.0)
        leaves = list(named_weights(model).values())
        return [*scores, *torch.autograd.grad(scores.logprobs_A.sum(), leaves)]

    ours = trained()
    plainly(monkeypatch)
    plain = trained()
    assert len(ours) == 2 + len(named_weights(model))
    assert all(error(a, b) < 1e-4 for a, b in zip(ours, plain, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)), "control"


if __name__ == "__main__":
    torch.save(results("cpu", torch.float32), sys.argv[1])
