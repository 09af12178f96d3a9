"""Random checkpoints made by `transformers`, Qwen3's or another family's, and our model loaded from
them.

Weights are large enough that greedy decoding wanders, and norm weights are not ones nor biases
zeros, so that one which is left out or misplaced shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from mesh.layout.holdings import local_tensors
from mesh.model.attention import packed_context
from mesh.model.families import shape_of_directory
from mesh.model.hf import load_weights
from mesh.model.layouts import role_layouts
from mesh.model.policy import Policy, build_policy, named_weights
from mesh.types import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
MAX_LENGTH = 128


@dataclass(frozen=True)
class Variant:
    """What differs between checkpoints. rope: parameters of RoPE beside its base; others: further
    entries of the family's configuration.
    """

    seed: int = 0
    tied: bool = True
    heads: int = 4
    kv_heads: int = 2
    theta: float = 5e5
    vocab_size: int = 96
    dim: int = 64
    pad_id: int | None = None
    family: str = "qwen3"
    head_dim: int | None = 24
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    others: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, variant: Variant, **options) -> PreTrainedModel:
    """Write a random checkpoint to `path` and return `transformers`' model of it."""
    # imported here because four ranks of a program, which only load, need not wait for it
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(variant.seed)
    of_head = {} if variant.head_dim is None else {"head_dim": variant.head_dim}
    config = AutoConfig.for_model(
        variant.family,
        vocab_size=variant.vocab_size,
        hidden_size=variant.dim,
        num_hidden_layers=2,
        num_attention_heads=variant.heads,
        num_key_value_heads=variant.kv_heads,
        intermediate_size=80,
        tie_word_embeddings=variant.tied,
        rope_parameters={**variant.rope, "rope_theta": variant.theta},
        initializer_range=0.2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=variant.pad_id,
        **of_head,
        **variant.others,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        if variant.pad_id is not None:  # zero in a new model
            model.model.embed_tokens.weight[variant.pad_id].normal_(0, 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.uniform_(-0.5, 0.5)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, **options)
    return model


def load_role(
    path: Path, mesh: DeviceMesh, rank: int = 0, fsdp: dict | None = None
) -> tuple[Policy, ModelShape]:
    """Our model on this rank with its blocks of the weights in `path`, as both roles load them."""
    shape = shape_of_directory(path)
    model = build_policy(shape, MAX_LENGTH, CPU, torch.float32, mesh, fsdp)
    layouts = role_layouts(shape, MAX_LENGTH, mesh.mesh, fsdp=fsdp is not None)
    blocks = {layout.name: layout.blocks.get(rank) for layout in layouts}
    with torch.no_grad():
        load_weights(path, local_tensors(named_weights(model)), blocks, shape)
    return model, shape


@dataclass(frozen=True)
class Packed:
    """Sequences packed end to end, and where each token but the first is predicted."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    lengths: list[int]
    index_A: torch.Tensor
    targets_A: torch.Tensor

    @property
    def context(self):
        """A new one for each forward pass, as the trainer makes it."""
        bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return packed_context(bounds, max(self.lengths))

    def scores(self, model: Policy, temperature: float = 1.0):
        return model(
            self.tokens_T, self.positions_T, self.context, self.index_A, self.targets_A, temperature
        )


def packed(sequences: list[list[int]]) -> Packed:
    tokens_T = torch.tensor([token for tokens in sequences for token in tokens])
    lengths = [len(tokens) for tokens in sequences]
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    starts = positions_T == 0
    index_A = (~starts).nonzero()[:, 0] - 1
    return Packed(tokens_T, positions_T, lengths, index_A, tokens_T[index_A + 1])


def random_sequences(lengths: list[int], seed: int = 0, vocab_size: int = 96) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
