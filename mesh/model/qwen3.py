"""Qwen3 by its shape: torchtitan's model, configured with our leaf modules.

The one door to torchtitan's model, FSDP and activation checkpointing. Left out: mixture of experts,
biases, RoPE scaling, pipeline and context parallelism.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.qwen3 import qwen3_configs
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

from mesh.model.attention import AttentionContext, PackedAttention
from mesh.model.layers import (
    ColumnLinear,
    Embedding,
    FeedForward,
    HeadRMSNorm,
    LMHead,
    QKVLinear,
    RMSNorm,
    Rotary,
    RowLinear,
    TransformerBlock,
    rope_table,
)
from mesh.model.logprobs import TokenScores
from mesh.model.parallel import apply_tp, replicate
from mesh.types import ModelShape

TINY = ModelShape(
    vocab_size=128,
    dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    ffn_dim=384,
    max_positions=4096,
)


class Qwen3(Qwen3Model):
    """The policy. Takes packed tokens; gives hidden states, or the logprobs of chosen targets."""

    @dataclass(kw_only=True, slots=True)
    class Config(Qwen3Model.Config):
        shape: ModelShape
        max_length: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        shape = config.shape
        self.rope_args = (shape.head_dim, config.max_length, shape.rope_theta)
        table = torch.empty(config.max_length, 2 * shape.head_dim)
        self.register_buffer("rope_table", table, persistent=False)
        self.token_group: dist.ProcessGroup | None = None

    def hidden(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Final hidden states [T, D]. Positions must be below `max_length`."""
        h_BTD = self.tok_embeddings(tokens_T)[None]
        rope_TE = self.rope_table.index_select(0, positions_T)
        for layer in self.layers.values():
            h_BTD = layer(h_BTD, context, rope_TE)
        return replicate(self.norm(h_BTD), len(tokens_T), self.token_group)[0]

    def forward(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        context: AttentionContext,
        index_A: torch.Tensor,
        targets_A: torch.Tensor,
        temperature: float,
    ) -> TokenScores:
        """Scores of targets_A, each predicted by the hidden state at index_A of the packed row."""
        hidden_TD = self.hidden(tokens_T, positions_T, context)
        return self.lm_head(hidden_TD[index_A], targets_A, temperature)


def flavors() -> list[str]:
    """The sizes that `model.flavor` knows: ours, and torchtitan's dense ones."""
    return ["tiny", *(name for name in qwen3_configs if name[0].isdigit() and "-A" not in name)]


def shape_of_flavor(flavor: str) -> ModelShape:
    """The shape of a named size. ValueError for an unknown one."""
    if flavor == "tiny":
        return TINY
    if flavor not in flavors():
        raise ValueError(f"model.flavor={flavor} is unknown; choose one of {', '.join(flavors())}")
    config = qwen3_configs[flavor]("varlen")
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    return ModelShape(
        vocab_size=config.vocab_size,
        dim=config.dim,
        num_layers=len(config.layers),
        num_heads=attention.n_heads,
        num_kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        ffn_dim=feed_forward.w1.out_features,
        rope_theta=attention.rope.theta,
        norm_eps=config.norm.eps,
        tied=config.enable_weight_tying,
        max_positions=attention.rope.max_seq_len,
    )


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def shape_of_directory(path: Path) -> ModelShape:
    """The shape that a Hugging Face `config.json` describes.

    Raises ValueError naming the entry that is missing, or that this program cannot run: another
    architecture, biases, scaled RoPE, sliding windows. What may be left out has `transformers`'
    default.
    """
    entries = json.loads((path / "config.json").read_text())
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"model.path={path}: config.json describes no model; copy it again")
    if entries.get("model_type") != "qwen3":
        raise ValueError(
            f"model.path={path}: model_type {entries.get('model_type')!r} is not supported; "
            "use a dense Qwen3 checkpoint (model_type qwen3)"
        )
    rope = entries.get("rope_parameters") or {}
    scaling = entries.get("rope_scaling") or {k: v for k, v in rope.items() if k == "rope_type"}
    refused = {
        "attention_bias": entries.get("attention_bias"),
        "hidden_act": entries.get("hidden_act", "silu") != "silu",
        "use_sliding_window": entries.get("use_sliding_window"),
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"model.path={path}: {name} in config.json is not supported; unset it")
    missing = [name for name in SIZES if name not in entries]
    if missing:
        raise ValueError(
            f"model.path={path}: config.json lacks {', '.join(missing)}; copy it again"
        )
    return ModelShape(
        vocab_size=entries["vocab_size"],
        dim=entries["hidden_size"],
        num_layers=entries["num_hidden_layers"],
        num_heads=entries["num_attention_heads"],
        num_kv_heads=entries["num_key_value_heads"],
        head_dim=entries.get("head_dim") or 128,
        ffn_dim=entries["intermediate_size"],
        rope_theta=float(entries.get("rope_theta") or rope.get("rope_theta") or 1e4),
        norm_eps=entries.get("rms_norm_eps", 1e-6),
        tied=entries.get("tie_word_embeddings", False),
        max_positions=entries.get("max_position_embeddings") or 32768,
    )


def _block(shape: ModelShape, layer: int) -> TransformerBlock.Config:
    def column(outputs: int) -> ColumnLinear.Config:
        return ColumnLinear.Config(in_features=shape.dim, out_features=outputs)

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=shape.dim, eps=shape.norm_eps)

    heads, kv_heads = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    attention = GQAttention.Config(
        n_heads=shape.num_heads,
        n_kv_heads=shape.num_kv_heads,
        dim=shape.dim,
        head_dim=shape.head_dim,
        qkv_linear=QKVLinear.Config(
            head_dim=shape.head_dim, wq=column(heads), wkv=column(kv_heads)
        ),
        wo=RowLinear.Config(in_features=heads, out_features=shape.dim),
        qk_norm=HeadRMSNorm.Config(normalized_shape=shape.head_dim, eps=shape.norm_eps),
        inner_attention=PackedAttention.Config(layer=layer),
        rope=Rotary.Config(dim=shape.head_dim, max_seq_len=0, theta=shape.rope_theta),
    )
    feed_forward = FeedForward.Config(
        w1=column(shape.ffn_dim),
        w2=RowLinear.Config(in_features=shape.ffn_dim, out_features=shape.dim),
        w3=column(shape.ffn_dim),
    )
    return TransformerBlock.Config(
        attention=attention, feed_forward=feed_forward, attention_norm=norm(), ffn_norm=norm()
    )


def model_config(shape: ModelShape, max_length: int) -> Qwen3.Config:
    """torchtitan's configuration of a model of this shape, with our leaf modules."""
    return Qwen3.Config(
        shape=shape,
        max_length=max_length,
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        enable_weight_tying=shape.tied,
        tok_embeddings=Embedding.Config(num_embeddings=shape.vocab_size, embedding_dim=shape.dim),
        norm=RMSNorm.Config(normalized_shape=shape.dim, eps=shape.norm_eps),
        lm_head=LMHead.Config(in_features=shape.dim, out_features=shape.vocab_size),
        layers=[_block(shape, layer) for layer in range(shape.num_layers)],
    )


def build_model(
    shape: ModelShape,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    fsdp: dict[str, Any] | None = None,
    sequence_parallel: bool = False,
) -> Qwen3:
    """A policy on this rank: weights sharded over `mesh`'s tp axis, with `fsdp` over its dp axes.

    Weights are allocated, not initialised; the RoPE table is computed. `fsdp`: keywords of
    `apply_fsdp`; without it (generation) the model is replicated over the dp axes.
    `sequence_parallel`: tokens are sharded over the tp axis where the weights are not.
    """
    with torch.device("meta"):
        model = Qwen3(model_config(shape, max_length))
    model.to(dtype)
    if mesh["tp"].size() > 1:
        apply_tp(model, mesh["tp"], sequence_parallel)
    if fsdp is not None:
        apply_fsdp(model, mesh, **fsdp)
    model.to_empty(device=device)
    if shape.tied:
        model.tok_embeddings.weight = model.lm_head.weight
    model.rope_table = rope_table(*model.rope_args, device)
    return model


def apply_fsdp(
    model: Qwen3, mesh: DeviceMesh, compute_dtype: torch.dtype, activation_checkpointing: str
) -> None:
    """Activation checkpointing, then FSDP2 (HSDP where dp_replicate > 1), both torchtitan's.

    Gradients are reduced in fp32 by plain sums: no division by the world size, and no
    pre-multiplied sum, which gloo does not have.
    """
    if activation_checkpointing != "none":
        policy = {"full": FullAC, "selective": SelectiveAC}[activation_checkpointing]
        policy(policy.Config()).apply(model)
    replicated = mesh["dp_replicate"].size() > 1
    apply_fsdp_to_decoder(
        model,
        mesh["dp_replicate", "dp_shard"] if replicated else mesh["dp_shard"],
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        pp_enabled=False,
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def parameter_names(name: str) -> str:
    """A parameter's name without the wrapper that activation checkpointing puts around layers."""
    return name.replace("_checkpoint_wrapped_module.", "")


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by torchtitan's names, a tied weight once under the name of each of its users."""
    pairs = model.named_parameters(remove_duplicate=False)
    return {parameter_names(name): parameter for name, parameter in pairs}


def adapter(shape: ModelShape) -> Qwen3StateDictAdapter:
    """torchtitan's map between its parameter names and Hugging Face's."""
    return Qwen3StateDictAdapter(model_config(shape, 1), None)
