"""The native engine against `transformers.generate`, the trainer's forward pass, and itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qwen3 import MAX_LENGTH, Variant, load_role, packed, random_sequences
from tiny_qwen3 import save_checkpoint as save

from mesh.engine.native.engine import EngineSettings, NativeEngine
from mesh.layout.reshard import Block
from mesh.model.hf import load_weights
from mesh.types import Request, Sampling

ROOMY = EngineSettings(
    max_length=MAX_LENGTH,
    max_sequences=64,
    kv_tokens=4096,
    page_size=16,
    prefill_tokens=8192,
    prefix_cache=True,
    cuda_graphs=False,
)
SAMPLED = Sampling(temperature=1.3, max_new_tokens=24, seed=5, step=2, stop_tokens=(3, 11))
GREEDY = Sampling(temperature=0.0, max_new_tokens=24, seed=0, step=0)
LENGTHS = [1, 16, 5, 40, 17, 1, 33, 2, 60, 15]


def requests(num_samples: int = 3, lengths=LENGTHS) -> list[Request]:
    prompts = random_sequences(lengths, seed=9)
    return [Request(10 + 7 * i, tuple(p), num_samples) for i, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{variant: (directory, transformers' model)} of two architectures."""
    root = tmp_path_factory.mktemp("checkpoints")
    variants = [Variant(4, tied=True, kv_heads=2), Variant(5, tied=False, kv_heads=4)]
    return [(root / str(v.seed), save(root / str(v.seed), v)) for v in variants]


@pytest.fixture(scope="module")
def make(checkpoints, solo_mesh):
    """An engine of the first checkpoint (or another) with some settings changed."""

    def engine(which: int = 0, **changes) -> NativeEngine:
        model, shape = load_role(checkpoints[which][0], solo_mesh)
        built = NativeEngine(model, shape, replace(ROOMY, **changes), None)
        built.reset(version=0)
        return built

    return engine


@pytest.fixture(scope="module")
def expected(make):
    """What a roomy engine makes of `requests()`, sampled."""
    return make().generate(requests(), SAMPLED)


def without_logprobs(completions):
    return [replace(completion, logprobs=()) for completion in completions]


def assert_same(completions, expected):
    """The same completions, logprobs to rounding."""
    assert without_logprobs(completions) == without_logprobs(expected)
    flat, right = ([x for c in cs for x in c.logprobs] for cs in (completions, expected))
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(right), rtol=0, atol=2e-5)


@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(checkpoints, make, which):
    asked = requests(num_samples=1)
    completions = make(which).generate(asked, GREEDY)
    assert [c.prompt_id for c in completions] == [r.prompt_id for r in asked]
    for request, completion in zip(asked, completions, strict=True):
        prompt = torch.tensor([request.tokens])
        theirs = checkpoints[which][1].generate(prompt, do_sample=False, max_new_tokens=24)
        assert list(completion.tokens) == theirs[0, len(request.tokens) :].tolist()
    assert len({t for c in completions for t in c.tokens}) > 20


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, top_k=5, top_p=0.8)])
@torch.no_grad()
def test_logprobs_are_those_of_the_full_forward(make, sampling):
    engine, asked = make(), requests()
    completions = engine.generate(asked, sampling)
    prompts = {r.prompt_id: list(r.tokens) for r in asked}
    batch = packed([prompts[c.prompt_id] + list(c.tokens) for c in completions])
    scores_A = batch.scores(engine.model, sampling.temperature or 1.0).logprobs_A
    sizes = [n - 1 for n in batch.lengths]
    for completion, scores in zip(completions, scores_A.split(sizes), strict=True):
        response = scores[-len(completion.tokens) :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), response, rtol=0, atol=1e-5)


SETTINGS = {
    "no prefix cache": {"prefix_cache": False},
    "one at a time": {"max_sequences": 1},
    "three at a time": {"max_sequences": 3, "prefix_cache": False},
    "chunked prefill": {"prefill_tokens": 3},
    "pages of one": {"page_size": 1, "prefill_tokens": 7},
    "pages of five": {"page_size": 5},
    "one large page": {"page_size": 128, "kv_tokens": 128 * 5},
    "all at once": {"page_size": 4, "prefill_tokens": 1, "max_sequences": 5, "kv_tokens": 100},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_do_not_change_the_completions(make, expected, case):
    assert_same(make(**SETTINGS[case]).generate(requests(), SAMPLED), expected)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_does_not_change_the_completions(make, expected, prefix_cache):
    tight = make(kv_tokens=96, page_size=8, prefix_cache=prefix_cache)
    assert_same(tight.generate(requests(), SAMPLED), expected)
    assert tight.preemptions > 0


def test_a_completion_does_not_depend_on_what_else_is_asked(make, expected):
    engine, asked = make(), requests()
    alone = [c for request in asked for c in engine.generate([request], SAMPLED)]
    assert_same(alone, expected)
    assert_same(engine.generate(asked[::-1], SAMPLED), expected)
    fewer = engine.generate([replace(r, num_samples=1) for r in asked], SAMPLED)
    assert_same(fewer, [c for c in expected if c.sample_id == 0])


def test_completions_come_in_the_order_of_prompts_and_samples(make):
    completions = make(max_sequences=4).generate(requests()[::-1], SAMPLED)
    in_order = [(r.prompt_id, sample) for r in requests() for sample in range(3)]
    assert [(c.prompt_id, c.sample_id) for c in completions] == in_order


def test_samples_differ_by_sample_step_and_seed(make):
    engine, asked = make(), requests(num_samples=4, lengths=[20])
    runs = [replace(SAMPLED, stop_tokens=(), **x) for x in ({}, {"seed": 6}, {"step": 3})]
    tokens = [c.tokens for run in runs for c in engine.generate(asked, run)]
    assert len(set(tokens)) == 12


def test_responses_end_at_a_stop_token_or_at_the_limit(make, expected):
    unstopped = make().generate(requests(), replace(SAMPLED, stop_tokens=()))
    for whole, completion in zip(unstopped, expected, strict=True):
        assert len(whole.tokens) == 24 and whole.finish_reason == "length"
        stops = [i for i, token in enumerate(whole.tokens) if token in SAMPLED.stop_tokens]
        length = stops[0] + 1 if stops else 24
        assert completion.tokens == whole.tokens[:length]
        assert len(completion.logprobs) == length
        assert completion.finish_reason == ("stop" if stops else "length")
    assert {c.finish_reason for c in expected} == {"stop", "length"}


def test_a_stop_token_at_the_limit_is_a_stop(make):
    (first,) = make().generate(requests(1, [9]), replace(GREEDY, max_new_tokens=1))
    stop = replace(GREEDY, max_new_tokens=1, stop_tokens=first.tokens)
    assert first.finish_reason == "length"
    assert make().generate(requests(1, [9]), stop)[0].finish_reason == "stop"


def test_no_requests_give_no_completions(make):
    assert make().generate([], SAMPLED) == []
    assert make().generate(requests(num_samples=0), SAMPLED) == []


def test_the_longest_prompt_that_fits_is_answered(make):
    asked = requests(1, [MAX_LENGTH - 24])
    tight = make(kv_tokens=MAX_LENGTH, page_size=8)
    assert_same(tight.generate(asked, GREEDY), make().generate(asked, GREEDY))


@pytest.mark.parametrize(
    ("changes", "length"), [({}, MAX_LENGTH - 23), ({"kv_tokens": 64}, 41), ({}, 0)]
)
def test_a_prompt_that_does_not_fit_is_refused(make, changes, length):
    with pytest.raises(ValueError, match="prompt 10: .*raise model.max_length or generator.kv"):
        make(**changes).generate(requests(1, [length]), GREEDY)


def test_an_engine_without_weights_refuses(checkpoints, solo_mesh):
    model, shape = load_role(checkpoints[0][0], solo_mesh)
    with pytest.raises(ValueError, match="no weights yet"):
        NativeEngine(model, shape, ROOMY, None).generate(requests(), GREEDY)


def test_after_new_weights_and_a_reset_an_engine_is_a_fresh_one(make, expected, tmp_path):
    save(tmp_path, Variant(6, tied=True, kv_heads=2))
    engine = make()
    assert engine.generate(requests(), SAMPLED) == expected
    tensors = {n: x for n, x in engine.weights().items() if n != "rope_table"}
    load_weights(tmp_path, tensors, whole_blocks(tensors), engine.shape)
    engine.reset(version=1)
    after = engine.generate(requests(), SAMPLED)
    fresh = make()
    fresh.bind(engine.weights())
    fresh.reset(version=1)
    assert after == fresh.generate(requests(), SAMPLED)
    assert sum(a.tokens == b.tokens for a, b in zip(after, expected, strict=True)) < 3


def whole_blocks(tensors):
    return {n: Block((0,) * x.ndim, tuple(x.shape)) for n, x in tensors.items()}


def test_weights_are_live_and_tied_weights_are_one(make):
    engine = make()
    weights = engine.weights()
    assert weights["lm_head.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()
    weights["norm.weight"].zero_()
    completions = engine.generate(requests(1, [5]), replace(GREEDY, max_new_tokens=2))
    assert completions[0].tokens == (0, 0)
    assert completions[0].logprobs == pytest.approx([-torch.tensor(96.0).log().item()] * 2)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_sizes_give_the_completions_of_a_roomy_engine(make, data):
    """Shared pages, part pages, preemption and chunks, in whatever sizes: nothing shows."""
    draw = data.draw
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    sampling = replace(SAMPLED, max_new_tokens=draw(st.integers(1, 12)))
    page_size = draw(st.integers(1, 12))
    need = max(lengths) + sampling.max_new_tokens
    engine = make(
        page_size=page_size,
        kv_tokens=draw(st.integers(need, 3 * need)),
        max_sequences=draw(st.integers(1, 8)),
        prefill_tokens=draw(st.integers(1, 40)),
        prefix_cache=draw(st.booleans()),
    )
    asked = requests(draw(st.integers(1, 4)), lengths)
    assert_same(engine.generate(asked, sampling), make().generate(asked, sampling))


@pytest.mark.parametrize(("prefix_cache", "prefills"), [(True, 1), (False, 3)])
def test_prefill_is_cut_and_a_shared_prompt_is_computed_once(make, prefix_cache, prefills):
    engine = make(prefill_tokens=30, max_sequences=30, prefix_cache=prefix_cache)
    sizes, hidden = [], engine.model.hidden

    def counted(tokens_T, positions_T, context):
        sizes.append(len(tokens_T))
        return hidden(tokens_T, positions_T, context)

    engine.model.hidden = counted
    completions = engine.generate(requests(), SAMPLED)
    assert max(sizes) == 30
    decoded = sum(len(c.tokens) for c in completions)
    assert sum(sizes) == decoded + prefills * sum(n - 1 for n in LENGTHS)


def test_nothing_of_weights_that_diverged_survives_a_reset(make, expected):
    engine = make()
    weight = engine.weights()["layers.0.attention_norm.weight"]
    kept = weight.clone()
    weight.fill_(torch.nan)
    engine.generate(requests(), SAMPLED)
    weight.copy_(kept)
    engine.reset(version=1)
    assert engine.generate(requests(), SAMPLED) == expected
