"""Drawn tokens reach their requests, with steps in flight as on CUDA. No model runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mesh.engine.vllm.checks import install_problems
from mesh.types import Sampling

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

from mesh.engine.sampler import sequence_keys
from mesh.engine.vllm.requests import Kept, key_of
from mesh.engine.vllm.sampler import CounterSampler

SAMPLING = Sampling(temperature=1.0, max_new_tokens=8, seed=3, step=1)


def logprob(token: int) -> float:
    return -token / 8


def samples(*names: str, num_prompt: int = 3) -> dict[str, Kept]:
    return {name: Kept(key_of(name), (), num_prompt, False) for name in names}


class Steps:
    """A sampler with the state that vLLM's runner would have in each step, and given draws."""

    def __init__(self) -> None:
        self.runner = SimpleNamespace(seq_lens=torch.zeros(4, dtype=torch.int64))
        self.sampler = CounterSampler(self.runner, self.draw)
        self.keys: list[int] = []
        self.positions: list[int] = []

    def draw(self, tokens_S, rows, sampling):
        drawn_S = self.runner.optimistic_seq_lens_cpu - rows.prompt_lengths[: len(tokens_S)]
        self.keys, self.positions = rows.keys[: len(tokens_S)].tolist(), drawn_S.tolist()
        assert (drawn_S >= 0).all()
        return tokens_S, -tokens_S / 8

    def step(self, **rows: tuple[int, int, int]) -> None:
        """Each row's name, with its prompt's length, the index of its token (-1: vLLM discards it)
        and the token."""
        names = [name.replace("_", "/").strip("/") for name in rows]
        prompts, indices, tokens = (np.array(column) for column in zip(*rows.values(), strict=True))
        self.runner.input_batch = SimpleNamespace(
            num_reqs=len(names), num_prompt_tokens=prompts, req_ids=names
        )
        self.runner.optimistic_seq_lens_cpu = torch.from_numpy(prompts + indices.clip(0))
        self.runner.discard_request_mask = SimpleNamespace(np=indices < 0)
        output = self.sampler(torch.from_numpy(tokens), None)
        assert output.sampled_token_ids.tolist() == [[token] for token in tokens]


def test_steps_in_flight_are_left_and_what_is_beyond_an_end_is_dropped():
    steps = Steps()
    steps.sampler.expect(samples("0/0/0", "1/0/1"), SAMPLING)
    steps.step(_0_0_0=(5, 0, 10), _1_0_1=(7, -1, 99))
    steps.step(_0_0_0=(5, 1, 11), _1_0_1=(7, 0, 20))
    steps.sampler.read(1)
    assert steps.sampler.drawn == {"0/0/0": ([10], [logprob(10)]), "1/0/1": ([], [])}
    steps.step(_0_0_0=(5, 2, 12), _1_0_1=(7, 1, 21))  # 0 has ended with 11, which vLLM has not seen
    steps.sampler.read(1)
    taken = steps.sampler.take("0/0/0")
    assert taken == (samples("0/0/0")["0/0/0"], [10, 11], [logprob(10), logprob(11)])
    steps.sampler.expect(samples("0/0/2"), SAMPLING)  # the same sample again, while 12 is in flight
    steps.step(_1_0_1=(7, 2, 22), _0_0_2=(3, 0, 30))
    steps.sampler.read(0)
    assert steps.sampler.take("1/0/1")[1] == [20, 21, 22]
    assert steps.sampler.take("0/0/2")[1:] == ([30], [logprob(30)])
    assert not steps.sampler.drawn and not steps.sampler.keys and not steps.sampler.steps
    assert not steps.sampler.samples


def test_of_two_draws_of_one_token_the_later_counts():
    steps = Steps()
    steps.sampler.expect(samples("0/0/0"), SAMPLING)
    for index, token in ((0, 10), (1, 11), (2, 12), (1, 13), (2, 14)):
        steps.step(_0_0_0=(5, index, token))
    steps.sampler.read(0)
    assert steps.sampler.take("0/0/0")[1] == [10, 13, 14]


def test_a_token_that_was_never_drawn_is_not_skipped():
    steps = Steps()
    steps.sampler.expect(samples("0/0/0"), SAMPLING)
    steps.step(_0_0_0=(5, 0, 10))
    steps.step(_0_0_0=(5, 2, 12))
    with pytest.raises(AssertionError, match="a token before 2 was not drawn"):
        steps.sampler.read(0)
    with pytest.raises(AssertionError, match="3 steps are in flight, and 2 have drawn"):
        steps.sampler.read(3)


def test_rows_have_the_keys_of_their_sequences_in_whatever_order_they_come():
    steps, ids = Steps(), torch.tensor([[0, 0], [1, 3]])
    steps.sampler.expect(samples("0/0/0", "1/3/1"), SAMPLING)
    first, second = sequence_keys(SAMPLING, ids).tolist()
    steps.step(_0_0_0=(5, 0, 10), _1_3_1=(7, 0, 20))
    assert steps.keys == [first, second]
    steps.step(_1_3_1=(7, 1, 20), _0_0_0=(5, 1, 10))
    assert steps.keys == [second, first]


def test_positions_of_a_later_turn_count_from_the_end_of_the_first_prompt():
    """vLLM takes the 9 tokens that are known before the turn for its prompt, and 4 are ours."""
    steps = Steps()
    steps.sampler.expect(samples("0/0/0", num_prompt=4), SAMPLING)
    for index in (0, 1):
        steps.step(_0_0_0=(9, index, 10 + index))
        assert steps.positions == [5 + index]
    steps.sampler.read(0)
    assert steps.sampler.take("0/0/0")[1] == [10, 11]
