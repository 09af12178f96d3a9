"""Models that are scored and never trained: the reference, from which the policy began, and a
teacher. They are sharded over the trainer's ranks as the policy is.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from mesh.model.layouts import role_layouts, weight_names
from mesh.model.policy import Policy, named_weights
from mesh.roles.models import build_model
from mesh.roles.trainer_settings import ModelSource, TrainerSettings


class FrozenModel:
    """Owns the weights of such a model. Every rank has one; off the trainer it holds nothing.

    layouts: of its weights, of the two names of a tied weight the first.
    """

    def __init__(
        self,
        source: ModelSource,
        settings: TrainerSettings,
        mesh: DeviceMesh,
        device: torch.device,
        on_trainer: bool,
    ) -> None:
        layouts = role_layouts(source.shape, settings.max_length, mesh.mesh, fsdp=True)
        names = weight_names(source.shape) - ({"lm_head.weight"} if source.shape.tied else set())
        self.layouts = [layout for layout in layouts if layout.name in names]
        self.model: Policy | None = None
        if on_trainer:
            self.model = build_model(source, settings, mesh, device, layouts)
            self.model.requires_grad_(False)

    def weights(self) -> dict[str, torch.Tensor]:
        """Weights by torchtitan's names; DTensors. Empty off the trainer."""
        return named_weights(self.model) if self.model is not None else {}

    def reshard(self) -> None:
        """Free what FSDP gathered for forward passes: it keeps the head until a backward pass,
        which does not come here."""
        for module in self.model.modules() if self.model is not None else ():
            if isinstance(module, FSDPModule):
                module.reshard()
