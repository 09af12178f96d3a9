"""The model on four real ranks: every layout against the same model in this process alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from launching import launch
from programs.parallel_program import (
    BETAS,
    CLIP,
    DTYPES,
    ENGINES,
    EPS,
    LR,
    NORMALISER,
    RECOMPUTED,
    SEED,
    SEQUENCES,
    SHARDED_ROWS,
    TEMPERATURE,
    TRAINERS,
    all_leaves,
)
from safetensors.torch import load_file
from tiny_qwen3 import Variant, load_role, packed, save_checkpoint

from mesh.layout.reshard import Block
from mesh.model.attention import packed_context
from mesh.model.init import STD, random_weights
from mesh.model.policy import named_weights
from mesh.rl.packing import pack

RANKS = range(4)
# a width that four ranks do not share evenly, and heads that they do; a pad id in the shard of the
# second of two ranks, the third of four
TIED = Variant(0, tied=True, kv_heads=4, dim=66, pad_id=69)
# q, k and v have biases, queries and keys no norms
BIASED = replace(TIED, seed=3, tied=False, family="qwen2")
# fewer kv heads than ranks
KV1, KV2 = replace(BIASED, seed=4, kv_heads=1), replace(TIED, seed=5, kv_heads=2)
# batch-invariant, the width is shared, too; on four ranks, so are the kv heads
EVEN = Variant(2, tied=False, kv_heads=2, dim=64)
TIED_CHECKPOINTS = ("tied", "kv2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The directory of one launch of the program: its checkpoints, exports and results."""
    directory = tmp_path_factory.mktemp("parallel")
    save_checkpoint(directory / "tied", TIED)
    save_checkpoint(directory / "untied", replace(TIED, seed=1, tied=False))
    save_checkpoint(directory / "biased", BIASED)
    save_checkpoint(directory / "even", EVEN)
    save_checkpoint(directory / "kv1", KV1)
    save_checkpoint(directory / "kv2", KV2)
    launch("tests/programs/parallel_program.py", 1, str(directory))
    return directory


@pytest.fixture(scope="module")
def results(root):
    """What each rank saw of each case: results[rank][case]."""
    return [torch.load(root / f"{rank}.pt", weights_only=False) for rank in RANKS]


def step_alone(model) -> dict:
    """One optimizer step of all leaves in one forward pass, with torch's own tools."""
    batch = pack(all_leaves())
    context = packed_context(batch.cu_seqlens, batch.max_seqlen)
    inputs = (batch.tokens_T, batch.positions_T, context, batch.index_A, batch.targets_A)
    logprobs_A, entropy_A = model(*inputs, TEMPERATURE)
    loss = -(logprobs_A * batch.advantages_A * batch.weights_A).sum()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in named_weights(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad /= NORMALISER
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    metrics = {
        "grad_norm": float(norm),
        "loss": loss.item() / NORMALISER,
        "entropy": float(entropy_A.mean()),
        "tokens/trained": float(len(batch.targets_A)),
    }
    return {
        "gradients": gradients,
        "updated": {n: p.detach().clone() for n, p in named_weights(model).items()},
        "metrics": metrics,
    }


@pytest.fixture(scope="module")
def alone(root, solo_mesh):
    """What the program says of each checkpoint, from one process: alone[checkpoint]."""
    expected = {}
    for checkpoint in ("tied", "untied", "biased", "kv1", "kv2"):
        model, _ = load_role(root / checkpoint, solo_mesh)
        loaded = {n: p.detach().clone() for n, p in named_weights(model).items()}
        with torch.no_grad():
            scores = tuple(packed(SEQUENCES).scores(model, TEMPERATURE))
        expected[checkpoint] = {"loaded": loaded, "scores": scores, **step_alone(model)}
        shapes = {n: tuple(p.shape) for n, p in loaded.items()}
        blocks = {n: Block((0,) * len(s), s) for n, s in shapes.items()}
        random = {n: torch.empty(s) for n, s in shapes.items()}
        if checkpoint in TIED_CHECKPOINTS:
            random["lm_head.weight"] = random["tok_embeddings.weight"]
        random_weights(random, shapes, blocks, SEED)
        expected[checkpoint]["random"] = random
    return expected


def pairs(results, alone, case, key):
    """(name, a rank's tensor, the right one) of every rank."""
    right = alone[TRAINERS[case][0]][key]
    for rank in RANKS:
        seen = results[rank][case][key]
        assert seen.keys() == right.keys()
        yield from ((name, seen[name], right[name]) for name in right)


@pytest.mark.parametrize("case", TRAINERS)
def test_scores_are_those_of_one_process(results, alone, case):
    for rank in RANKS:
        for seen, right in zip(
            results[rank][case]["scores"], alone[TRAINERS[case][0]]["scores"], strict=True
        ):
            torch.testing.assert_close(seen, right, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("case", TRAINERS)
def test_gradients_are_those_of_one_process(results, alone, case):
    for name, seen, right in pairs(results, alone, case, "gradients"):
        scale = right.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            seen, right, rtol=0, atol=2e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", TRAINERS)
def test_the_embedding_of_the_pad_id_learns_through_a_tied_head_only(results, alone, case):
    assert any(TIED.pad_id in r.tokens[:-1] for leaf in all_leaves() for r in leaf.rollouts)
    for name, seen, _ in pairs(results, alone, case, "gradients"):
        if name == "tok_embeddings.weight":
            learned = bool(seen[TIED.pad_id].any())
            assert learned == (TRAINERS[case][0] in TIED_CHECKPOINTS)


@pytest.mark.parametrize("case", TRAINERS)
def test_metrics_of_an_update_are_those_of_one_process(results, alone, case):
    expected = alone[TRAINERS[case][0]]["metrics"]
    assert expected["grad_norm"] > 2 * CLIP
    for rank in RANKS:
        metrics = results[rank][case]["metrics"]
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        full = results[rank][case]["gradients"]
        counted = {name: g for name, g in full.items() if not tied_twice(case, name)}
        norm = sum(g.double().square().sum() for g in counted.values()).sqrt() / NORMALISER
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)


def tied_twice(case, name):
    return TRAINERS[case][0] in TIED_CHECKPOINTS and name == "lm_head.weight"


@pytest.mark.parametrize("case", TRAINERS)
def test_updated_weights_are_those_of_one_process(results, alone, case):
    moved = 0.0
    for name, seen, right in pairs(results, alone, case, "updated"):
        torch.testing.assert_close(seen, right, rtol=0, atol=2e-3 * LR)
        moved = max(moved, (right - alone[TRAINERS[case][0]]["loaded"][name]).abs().max().item())
    assert moved > LR / 10


@pytest.mark.parametrize("case", TRAINERS)
@pytest.mark.parametrize("key", ["loaded", "random"])
def test_weights_have_the_same_bits_in_every_layout(results, alone, case, key):
    unequal = {name for name, seen, right in pairs(results, alone, case, key)
               if not torch.equal(seen, right)}  # fmt: skip
    assert unequal == set()


def test_random_weights_are_normal_and_differ_by_name(alone):
    weights = alone["untied"]["random"]
    assert torch.equal(weights["norm.weight"], torch.ones(66))
    bias = alone["biased"]["random"]["layers.1.attention.qkv_linear.wk.bias"]
    assert torch.equal(bias, torch.zeros(96))
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            assert tensor.std().item() == pytest.approx(STD, rel=0.1), name
            assert abs(tensor.mean()) < 5 * STD / tensor.numel() ** 0.5, name
    firsts = [tensor.flatten()[0].item() for tensor in weights.values() if tensor.ndim == 2]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize("case", TRAINERS)
def test_exports_are_the_checkpoint_bit_for_bit(root, results, case):
    original = load_file(root / TRAINERS[case][0] / "model.safetensors")
    exported = load_file(root / "exports" / case / "model.safetensors")
    assert exported.keys() == original.keys()
    assert [name for name in original if not torch.equal(exported[name], original[name])] == []


def differing_logprobs(results, enabled: bool, dtype: torch.dtype) -> tuple[int, int]:
    """(differing, compared) logprobs of sequence-parallel layouts against those without tp."""
    differing = compared = 0
    for rank, tp, num_tokens in product(RANKS, (2, 4), SHARDED_ROWS):
        key = (enabled, dtype, num_tokens)
        seen, right = (results[rank][f"rows_tp{n}"]["logprobs"][key] for n in (tp, 1))
        assert len(right) == num_tokens and right.isfinite().all()
        atol = 3e-5 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(seen, right, rtol=0, atol=atol)
        differing += int((seen != right).sum())
        compared += num_tokens
    return differing, compared


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sequence_parallel_norms_see_a_share_of_the_tokens(results, tp):
    for rank in RANKS:
        rows = results[rank][f"rows_tp{tp}"]["normed_rows"]
        assert len(rows) == 5
        assert all(seen == [-(-37 // tp)] for seen in rows.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_sequence_parallel_logprobs_have_the_bits_of_one_rank(results, dtype):
    assert differing_logprobs(results, True, dtype) == (0, 4 * 2 * (37 + 3 + 1))
    differing, _ = differing_logprobs(results, False, dtype)
    assert differing > 0, "control: without the switch the same rows differ"


@pytest.mark.parametrize("num_tokens", SHARDED_ROWS)
@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallel_gradients_are_those_of_one_rank(results, num_tokens, tp):
    for rank in RANKS:
        seen, right = (results[rank][f"rows_tp{n}"]["gradients"][num_tokens] for n in (tp, 1))
        assert seen.keys() == right.keys() and len(right) == 25
        # where a token sees almost only itself, its queries' and keys' gradients cancel
        noise = 1e-7 * sum(gradient.norm() ** 2 for gradient in right.values()) ** 0.5
        for name, gradient in right.items():
            assert gradient.norm() > 0, name
            assert (seen[name] - gradient).norm() <= 1e-5 * gradient.norm() + noise, name


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputation_keeps_the_bits_of_sequence_parallel_gradients(results, recompute):
    for rank in RANKS:
        gradients = results[rank]["rows_tp2"]["gradients"]
        seen, right = gradients[recompute], gradients[37]
        assert seen.keys() == right.keys()
        assert [name for name in right if not torch.equal(seen[name], right[name])] == []


@pytest.mark.parametrize("case", ENGINES)
@pytest.mark.parametrize("sampling", ["greedy", "sampled", "truncated"])
def test_tensor_parallel_engines_draw_the_same_tokens(results, case, sampling):
    expected = results[0][one_rank(case)][sampling]
    assert len({token for c in expected for token in c.tokens}) > 10
    for rank in RANKS:
        completions = results[rank][case][sampling]
        assert [replace(c, logprobs=()) for c in completions] == [
            replace(c, logprobs=()) for c in expected
        ]
        for completion, right in zip(completions, expected, strict=True):
            assert completion.logprobs == pytest.approx(right.logprobs, abs=3e-5)
        assert results[rank][case]["preemptions"] > 0


def one_rank(case):
    """The engine of the same checkpoint without tensor parallelism."""
    return next(name for name, engine in ENGINES.items() if engine == (ENGINES[case][0], 1))


@pytest.mark.parametrize("case", ENGINES)
def test_tensor_parallel_engines_hold_their_share(results, case):
    """Of two kv heads, each of four ranks holds both."""
    checkpoint, tp = ENGINES[case]
    for rank in RANKS:
        whole, part = results[0][one_rank(case)]["sizes"], results[rank][case]["sizes"]
        shared = {name for name in whole if whole[name] != part[name]}
        cut = {name for name in whole if is_matrix(name)}
        if checkpoint == "kv2":
            cut -= {name for name in whole if ".wk." in name or ".wv." in name}
        assert shared == (cut if tp > 1 else set())
        assert all(part[name] * tp == whole[name] for name in shared)


def is_matrix(name):
    return "norm" not in name and name != "rope_table"
