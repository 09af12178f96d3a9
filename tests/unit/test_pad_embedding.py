"""The embedding of `pad_token_id`: trained where `transformers` trains it, through a tied head or a
head of its own, and never through being looked up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_qwen3 import Variant, load_role, packed, random_sequences, save_checkpoint
from transformers import AutoModelForCausalLM

from mesh.engine.native.engine import EngineSettings, NativeEngine
from mesh.model.families import config_entries, shape_of_directory
from mesh.model.lookup import OrderedLookup, lookup
from mesh.model.policy import named_weights
from mesh.types import Request, Sampling

PAD = 5
SEQUENCES = [[PAD, 3, 9, PAD, 11], [7, PAD, PAD, 2], random_sequences([20])[0]]
NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}


def gradients_of(model, weights_A):
    """Gradients of a weighted sum of the logprobs of SEQUENCES."""
    logprobs_A, _ = packed(SEQUENCES).scores(model)
    (logprobs_A * weights_A).sum().backward()
    return {name: weight.grad for name, weight in named_weights(model).items()}


def their_gradients(theirs, weights_A):
    logprobs = []
    for tokens in SEQUENCES:
        row_TV = theirs(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        logprobs.append(row_TV.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0])
    (torch.cat(logprobs) * weights_A).sum().backward()
    return dict(theirs.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pad_id", [PAD, PAD - 96, None, 0])
def test_gradients_are_those_of_transformers(tmp_path, solo_mesh, tied, pad_id):
    """A negative id counts from the end, as torch's Embedding takes it."""
    save_checkpoint(tmp_path, Variant(0, tied=tied))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": pad_id}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, shape = load_role(tmp_path, solo_mesh)
    assert shape.pad_id == (None if pad_id is None else pad_id % 96)
    weights_A = torch.linspace(-1.5, 1.0, len(packed(SEQUENCES).index_A))
    ours, expected = gradients_of(model, weights_A), their_gradients(theirs, weights_A)
    for name, their_name in NAMES.items():
        gradient, right = ours[name], expected[their_name].grad
        scale = right.abs().max().item()
        torch.testing.assert_close(gradient, right, rtol=0, atol=2e-5 * scale)
    row = ours["tok_embeddings.weight"][PAD]
    frozen = not tied and pad_id in (PAD, PAD - 96)
    assert bool(row.any()) != frozen
    assert ours["lm_head.weight"][PAD].any(), "the head learns to give it a probability"


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("pad_row", [None, 0, 2, 8])
def test_only_the_gradient_of_the_pad_row_is_zero(ordered, pad_row):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (60,), generator=generator)
    weight = torch.randn(9, 8, generator=generator, requires_grad=True)
    grad = torch.randn(60, 8, generator=generator)
    rows = (
        OrderedLookup.apply(tokens, weight, pad_row) if ordered else lookup(tokens, weight, pad_row)
    )
    (found,) = torch.autograd.grad(rows, weight, grad)
    assert torch.equal(rows, weight[tokens]), "its value is that of any row"
    expected = torch.zeros(9, 8, dtype=torch.float64).index_add_(0, tokens, grad.double())
    if pad_row is not None:
        expected[pad_row] = 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_row_outside_the_weight_is_an_error_not_another_row():
    with pytest.raises(AssertionError, match="row -1 of 4"):
        lookup(torch.zeros(3, dtype=torch.int64), torch.zeros(4, 2), -1)


@pytest.mark.parametrize("pad_id", [None, 0, PAD])
def test_the_id_is_written_back(tmp_path, solo_mesh, pad_id):
    save_checkpoint(tmp_path, Variant(pad_id=pad_id))
    entries = config_entries(shape_of_directory(tmp_path), (1,))
    assert entries.get("pad_token_id", None) == pad_id
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert shape_of_directory(tmp_path).pad_id == pad_id


def test_a_pad_that_also_ends_a_response_is_sampled(tmp_path, solo_mesh):
    save_checkpoint(tmp_path, Variant())
    model, shape = load_role(tmp_path, solo_mesh)
    greedy = Sampling(temperature=0.0, max_new_tokens=8, seed=0, step=0)

    def answer(shape, sampling):
        settings = EngineSettings(128, 2, 256, 16, 64, prefix_cache=True, cuda_graphs=False)
        engine = NativeEngine(model, shape, settings, None)
        engine.reset(version=0)
        (completion,) = engine.generate([Request(0, (3, 4, 5), 1)], sampling)
        return completion

    free = answer(shape, greedy).tokens
    end = next(token for token in free[3:] if token not in free[:3])
    stopped = answer(replace(shape, pad_id=end), replace(greedy, stop_tokens=(end,)))
    assert stopped.tokens == free[: free.index(end) + 1] and stopped.finish_reason == "stop"
