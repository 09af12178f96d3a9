"""The section `trainer.*` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mesh.config.declare import INF, key


@dataclass(frozen=True)
class TrainerConf:
    dp_replicate: int = key(1, "replicas of the sharded model (HSDP)", ge=1)
    dp_shard: int | None = key(
        None, "ranks that share one copy (FSDP); unset: fills the submesh", ge=1
    )
    tp: int = key(1, "tensor-parallel degree", ge=1)
    dtype: Literal["float32", "bfloat16"] | None = key(
        None, "compute dtype over fp32 master weights; unset: bfloat16 on CUDA, float32 on CPU"
    )
    optimizer: str | None = key(
        None, "MODULE:NAME of an optimizer of your own, or of torch (torch.optim:SGD); unset: AdamW"
    )
    optimizer_args: dict[str, Any] = key(
        {}, "that optimizer's own settings, e.g. trainer.optimizer_args.momentum=0.9"
    )
    lr: float = key(1e-6, "peak learning rate", gt=0, lt=INF)
    betas: tuple[float, float] = key(
        (0.9, 0.95), "AdamW's betas; unused with trainer.optimizer", ge=0, lt=1
    )
    eps: float = key(1e-8, "AdamW's epsilon; unused with trainer.optimizer", gt=0, lt=INF)
    weight_decay: float = key(
        0.0, "decoupled weight decay of the weights in trainer.weight_decay_on", ge=0, lt=INF
    )
    weight_decay_on: Literal["all", "matrices"] = key(
        "all", "weights that decay: all, or neither norms nor biases nor embeddings"
    )
    fused: bool = key(False, "AdamW's fused kernel: each update in one pass over the weights")
    warmup_steps: int = key(0, "steps of linear learning-rate warm-up", ge=0)
    decay: Literal["none", "linear", "cosine"] = key(
        "none", "learning rate after the warm-up: constant, or down to trainer.lr_floor"
    )
    decay_steps: int | None = key(
        None, "steps at whose end the decay has reached the floor; unset: all of the run", ge=1
    )
    lr_floor: float = key(
        0.0, "where the decay ends, as a share of the peak learning rate", ge=0, le=1
    )
    clip_norm: float = key(1.0, "max gradient norm; 0: no clipping", ge=0, lt=INF)
    microbatch_tokens: int = key(16384, "max tokens packed into one forward pass [tokens]", ge=1)
    activation_checkpointing: Literal["none", "selective", "full"] = key(
        "none", "recompute activations in the backward pass"
    )
    sequence_parallel: bool = key(
        False, "between tensor-parallel layers a rank keeps only its share of the tokens"
    )
