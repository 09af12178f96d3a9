"""The policy: torchtitan's decoder, built from a shape with our leaf modules.

The only importer of torchtitan's model, FSDP and activation checkpointing; nothing outside this
room names a model class. What differs between families is configuration of the one model: norms of
queries and keys, biases, scaled RoPE, tying. Left out: mixture of experts, sliding windows,
pipeline and context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.qwen3.model import Qwen3Model

from mesh.model.attention import AttentionContext, PackedAttention
from mesh.model.divergence import HeadInputs
from mesh.model.head import LMHead
from mesh.model.layers import (
    ColumnLinear,
    Embedding,
    FeedForward,
    HeadRMSNorm,
    QKVLinear,
    RMSNorm,
    Rotary,
    RowLinear,
    TransformerBlock,
)
from mesh.model.logprobs import TaughtScores, TokenScores
from mesh.model.parallel import apply_tp, replicate
from mesh.model.rope import rope_table
from mesh.model.token_sets import TokenSets
from mesh.types import ModelShape


class Policy(Qwen3Model):
    """Maps packed tokens to hidden states, or to the logprobs of given targets."""

    @dataclass(kw_only=True, slots=True)
    class Config(Qwen3Model.Config):
        shape: ModelShape
        max_length: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        shape = config.shape
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
        targets_A: torch.Tensor | None,
        temperature: float,
        teacher: HeadInputs | None = None,
        sets: TokenSets | None = None,
    ) -> TokenScores | TaughtScores | HeadInputs:
        """Scores of targets_A, each predicted from the hidden state at index_A of the row.

        teacher: its head's inputs at the same places, for the KL to it. sets: of the truncated
        distributions that are scored. Without targets: the own head's inputs, as another model's
        scores take them.
        """
        hidden_TD = self.hidden(tokens_T, positions_T, context)
        return self.lm_head(hidden_TD[index_A], targets_A, temperature, teacher, sets)


def _block(shape: ModelShape, layer: int) -> TransformerBlock.Config:
    def column(outputs: int, bias: bool = False, parts: int | None = None) -> ColumnLinear.Config:
        return ColumnLinear.Config(
            in_features=shape.dim, out_features=outputs, bias=bias, parts=parts
        )

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=shape.dim, eps=shape.norm_eps)

    heads, kv_heads = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    head_norm = HeadRMSNorm.Config(normalized_shape=shape.head_dim, eps=shape.norm_eps)
    attention = GQAttention.Config(
        n_heads=shape.num_heads,
        n_kv_heads=shape.num_kv_heads,
        dim=shape.dim,
        head_dim=shape.head_dim,
        qkv_linear=QKVLinear.Config(
            head_dim=shape.head_dim,
            wq=column(heads, shape.qkv_bias),
            wkv=column(kv_heads, shape.qkv_bias, parts=shape.num_kv_heads),
        ),
        wo=RowLinear.Config(in_features=heads, out_features=shape.dim),
        qk_norm=head_norm if shape.qk_norm else None,
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


def model_config(shape: ModelShape, max_length: int) -> Policy.Config:
    """torchtitan's config for a model of this shape, with our leaf modules."""
    return Policy.Config(
        shape=shape,
        max_length=max_length,
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        enable_weight_tying=shape.tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=shape.vocab_size, embedding_dim=shape.dim, pad_id=shape.pad_id
        ),
        norm=RMSNorm.Config(normalized_shape=shape.dim, eps=shape.norm_eps),
        lm_head=LMHead.Config(
            in_features=shape.dim, out_features=shape.vocab_size, textless=shape.textless
        ),
        layers=[_block(shape, layer) for layer in range(shape.num_layers)],
    )


def build_policy(
    shape: ModelShape,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    fsdp: dict[str, Any] | None = None,
    sequence_parallel: bool = False,
) -> Policy:
    """Build this rank's part of a policy, sharded over the tp axis and, with `fsdp`, over dp.

    Weights are allocated, not initialised; the RoPE table is computed. `fsdp`: keyword arguments of
    `apply_fsdp`; without it (generation) the model is replicated over the dp axes.
    `sequence_parallel`: tokens are sharded over the tp axis where the weights are not.
    """
    with torch.device("meta"):
        model = Policy(model_config(shape, max_length))
    model.to(dtype)
    if mesh["tp"].size() > 1:
        apply_tp(model, mesh["tp"], sequence_parallel)
    if fsdp is not None:
        apply_fsdp(model, mesh, **fsdp)
    model.to_empty(device=device)
    if shape.tied:
        model.tok_embeddings.weight = model.lm_head.weight
    model.rope_table = rope_table(
        shape.head_dim, max_length, shape.rope_theta, device, shape.rope_scaling
    )
    return model


def apply_fsdp(
    model: Policy, mesh: DeviceMesh, compute_dtype: torch.dtype, activation_checkpointing: str
) -> None:
    """Apply torchtitan's activation checkpointing, then its FSDP2 (HSDP if dp_replicate > 1).

    Gradients are reduced in fp32 by plain sums: no division by the world size, and no
    pre-multiplied sum, which gloo lacks.
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
    """Strip activation checkpointing's wrapper from a parameter's name."""
    return name.replace("_checkpoint_wrapped_module.", "")


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by torchtitan's names; a tied weight appears under each of its names."""
    pairs = model.named_parameters(remove_duplicate=False)
    return {parameter_names(name): parameter for name, parameter in pairs}
