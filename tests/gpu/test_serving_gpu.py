"""What a run on a GPU exports, served by a vLLM of its own on one and two: the bits of training."""

from __future__ import annotations

import pytest
import torch
from served import Served, served

from mesh.engine.vllm.checks import install_problems
from mesh.runs.sample_rows import shortest

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
if GPUS < 1 or install_problems("cuda"):
    pytest.skip("needs a GPU and vLLM's CUDA build", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.skipif(
    GPUS < 2, reason="needs two GPUs"))])  # fmt: skip
def made(request, tmp_path_factory) -> tuple[int, Served]:
    root, tp = tmp_path_factory.mktemp("served"), request.param
    return tp, served(root, ["device=cuda"], [tp], {"gpu_memory_utilization": 0.3})


def test_prompt_logprobs_are_those_of_samples_jsonl(made):
    tp, found = made
    samples, scored = found.run.samples, found.answers[tp]["scored"]
    assert len(samples) == len(scored) == 16
    for sample, logprobs in zip(samples, scored, strict=True):
        assert shortest(logprobs[-len(sample["tokens"]) :]) == sample["logprobs"]


def test_decoding_with_cuda_graphs_has_the_bits_of_scoring(made):
    tp, found = made
    assert [x for _, x in found.answers[tp]["drawn"]] == found.answers[tp]["again"]
