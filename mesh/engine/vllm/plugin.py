"""The entry point `vllm.general_plugins` by which a vLLM of its own finds our model.

vLLM calls `register` in each of its processes, once or more, whatever model they run: so it names
the model, and imports neither it nor torchtitan. In a vLLM of another version, which may lack the
parts that the model is made of, a model is registered that refuses to start.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import nn
from vllm import ModelRegistry

from mesh.config.keys import refuse
from mesh.engine.vllm.checks import version_problems

ARCHITECTURE = "MeshPolicy"
"""What a user names in hf_overrides."""


def register() -> None:
    """Register the model that is served, and vLLM's hook for it."""
    if misfit():
        ModelRegistry.register_model(ARCHITECTURE, Misfit)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    ModelRegistry.register_model(ARCHITECTURE, "mesh.engine.vllm.served:ServedModel")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServedConfig


class ServedConfig:
    """vLLM's hook for our architecture, called while vLLM makes its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        from mesh.engine.vllm.serving import choose_runner

        choose_runner(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        from mesh.engine.vllm.serving import configure

        configure(vllm_config)


def misfit() -> list[str]:
    """The problem of a vLLM of another version than ours."""
    from vllm.platforms import current_platform  # known once vLLM starts

    device = "cuda" if current_platform.is_cuda() else "cpu"
    return version_problems("architectures", ARCHITECTURE, device, vllm.__version__)


class Misfit(nn.Module):
    """Our model in a vLLM of another version. Raises a Refusal when it is built."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        refuse(misfit())

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
