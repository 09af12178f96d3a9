"""vllm.model=titan: the trainer's own model, registered with vLLM as an out-of-tree model.

vLLM schedules tokens and assigns the pages of their keys and values. Its batch metadata becomes an
`AttentionContext`, and the model is called as the native engine calls it, so that both have the
same bits. Parameters keep their names and their storage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from mesh.engine.base import num_pages
from mesh.engine.choice import tile_logits
from mesh.model.attention import AttentionContext, KVCache, packed_context
from mesh.model.parallel import local
from mesh.model.policy import Policy
from mesh.types import ModelShape

ARCHITECTURE = "MeshGenerator"
"""The model inside a run; `plugin.ARCHITECTURE` is served alone."""

Blueprint = tuple[Policy, ModelShape, dist.ProcessGroup | None]
"""(model, its shape, the tp ranks; None: one) of the engine that is being built."""

blueprint: ContextVar[Blueprint] = ContextVar("blueprint")
"""vLLM builds the model from a configuration of its own, which cannot hold these."""


class ContextBuilder(AttentionMetadataBuilder[AttentionContext]):
    """Build the model's context from vLLM's metadata of a batch."""

    # captured decode steps read vLLM's persistent buffers: nothing is copied here on CUDA
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AttentionContext:
        batch, page_size = common_attn_metadata, self.kv_cache_spec.block_size
        table = batch.block_table_tensor
        if not table.is_cuda:  # the plain attention reads every page that the table names
            table = table[:, : num_pages(batch.max_seq_len, page_size)]
        return AttentionContext(
            cu_seqlens=batch.query_start_loc,
            lengths=batch.seq_lens,
            max_query=batch.max_query_len,
            max_length=table.shape[1] * page_size,
            block_table=table,
            slots_T=batch.slot_mapping,
        )


class PagedBackend(AttentionBackend):
    """Attention over vLLM's pages by the functions of training and of the native engine."""

    supported_dtypes = [torch.float32, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise AssertionError(
            "vLLM asks for an attention layer, and the model calls attention itself"
        )

    @staticmethod
    def get_builder_cls() -> type[ContextBuilder]:
        return ContextBuilder


class PagedLayer(AttentionLayerBase):
    """One layer's share of vLLM's KV cache: keys and values [num_pages, page_size, K, H]."""

    def __init__(self, spec: FullAttentionSpec, num_heads: int) -> None:
        self.spec = spec
        self.num_heads = num_heads
        self.kv_cache = torch.tensor([])
        self.pages: list[torch.Tensor] = []

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.spec

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Divide the layer's memory into keys and values, because our kernels read a token's heads
        side by side. kv_cache: [num_pages, K, page_size, 2 * H] with strides in some order.
        """
        self.kv_cache = kv_cache
        order = sorted(range(kv_cache.ndim), key=kv_cache.stride, reverse=True)
        memory = kv_cache.permute(order)
        assert memory.is_contiguous(), "vLLM's KV cache of one layer is not contiguous"
        spec = self.spec
        shape = (2, len(kv_cache), spec.block_size, spec.num_kv_heads, spec.head_size)
        self.pages = list(memory.reshape(-1).view(shape).unbind())


class PagedPolicy(nn.Module):
    """A policy behind vLLM's model interface. group: its tp ranks; None: one.

    `observer`, where there is one, is called with context and positions of every forward pass.
    """

    def __init__(
        self,
        policy: Policy,
        shape: ModelShape,
        group: dist.ProcessGroup | None,
        vllm_config: VllmConfig,
    ) -> None:
        super().__init__()
        self.policy, self.shape, self.group = policy, shape, group
        self.observer: Callable[[AttentionContext, torch.Tensor], None] | None = None
        tp = 1 if group is None else dist.get_world_size(group)
        dtype = vllm_config.model_config.dtype
        spec = FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=shape.kv_heads_of_rank(tp),
            head_size=shape.head_dim,
            dtype=dtype,
        )
        self.cache: KVCache | None = None
        self.names = [f"layers.{layer}.attention" for layer in range(shape.num_layers)]
        self.paged = [PagedLayer(spec, shape.num_heads // tp) for _ in self.names]
        layers = vllm_config.compilation_config.static_forward_context
        layers.update(zip(self.names, self.paged, strict=True))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.policy.tok_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, D] of the scheduled tokens."""
        return self.policy.hidden(input_ids, positions, self._context(positions))

    def head(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logits [S, V / tp] of this rank's vocabulary shard."""
        return tile_logits(hidden_SD, local(self.policy.lm_head.weight), self.group)

    def _context(self, positions: torch.Tensor) -> AttentionContext:
        metadata = get_forward_context().attn_metadata
        if not metadata:  # vLLM profiles memory before it has a cache
            bounds = torch.tensor([0, len(positions)], dtype=torch.int32, device=positions.device)
            return packed_context(bounds, len(positions))
        if self.cache is None:
            keys, values = zip(*(layer.pages for layer in self.paged), strict=True)
            self.cache = KVCache(list(keys), list(values))
        context: AttentionContext = metadata[self.names[0]]
        if self.observer is not None:
            self.observer(context, positions)
        assert context.slots_T is not None
        # rows that pad a captured batch have no slot: they write page 0, which vLLM never allocates
        return replace(context, cache=self.cache, slots_T=context.slots_T.clamp(min=0))


class TitanModel(PagedPolicy):
    """The generator's model inside a run; the weight bridge writes its weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(*blueprint.get(), vllm_config)

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """The hidden states unchanged: the product is a part of our draws."""
        return hidden_SD
