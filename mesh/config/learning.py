"""The section of the configuration that names a model to learn from: `teacher.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mesh.config.declare import INF, key


@dataclass(frozen=True)
class TeacherConf:
    path: str | None = key(
        None, "Hugging Face model directory of the model to distil from, of the same vocabulary"
    )
    coef: float | None = key(
        None,
        "weight of the KL to the teacher; unset: the loss's, 1 of loss=distill, else 0",
        ge=0,
        lt=INF,
    )
    kl: Literal["sampled", "full"] = key(
        "sampled",
        "that KL as an advantage, estimated by the token that was drawn, or over the whole "
        "vocabulary with its exact gradient",
    )
    ignore_config: list[str] = key(
        [], "entries of its config.json that are read as if they were not there"
    )
    ignore_tensors: list[str] = key(
        [], "tensors in its directory that are left out: names, or patterns like score.*"
    )
