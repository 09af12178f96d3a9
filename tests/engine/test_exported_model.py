"""Exports of every family in vLLM's own model.

vLLM refuses a missing weight, unless it is a part of a fused one. So the answers are compared.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from launching import launch
from model_sources import FAMILIES, exported, source
from programs.plain_vllm_program import NEW_TOKENS
from tiny_qwen3 import random_sequences
from transformers import AutoModelForCausalLM

from mesh.engine.vllm.checks import install_problems

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)
OF_VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@torch.no_grad()
def test_vllm_continues_an_export_as_transformers_does_its_source(tmp_path, solo_mesh, monkeypatch):
    prompts = random_sequences([1, 17, 40], seed=4)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    sources = [source(tmp_path / f"of-{family}", family=family) for family in FAMILIES]
    directories = [
        exported(path, tmp_path / family, solo_mesh)
        for path, family in zip(sources, FAMILIES, strict=True)
    ]
    for name, value in OF_VLLM.items():
        monkeypatch.setitem(os.environ, name, value)
    words = [str(tmp_path / "prompts.json"), *map(str, directories)]
    output = launch("tests/programs/plain_vllm_program.py", 1, *words, seconds=500).stdout
    for path, found in zip(sources, json.loads(output.splitlines()[-1]), strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for prompt, tokens in zip(prompts, found, strict=True):
            text = list(prompt)
            for _ in range(NEW_TOKENS):
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            assert text[len(prompt) :] == tokens, path.name
    assert len({token for tokens in found for token in tokens}) > 8
