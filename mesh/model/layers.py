"""Leaf modules of the policy, in one file for both roles.

Each replaces torchtitan's module of the same name through its config, so that the model's structure
and parameter names stay torchtitan's while every operation that trainer and generator execute is
one function here. Activations are packed: x_BTD with B = 1, the tokens of many sequences in a row.
With sequence parallelism each rank holds a shard of the tokens between the tensor-parallel regions,
which begin in TransformerBlock and end in RowLinear (`mesh/model/parallel.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchtitan.models.common.attention import QKVLinear as TitanQKVLinear
from torchtitan.models.common.embedding import Embedding as TitanEmbedding
from torchtitan.models.common.feed_forward import FeedForward as TitanFeedForward
from torchtitan.models.common.linear import Linear as TitanLinear
from torchtitan.models.common.nn_modules import RMSNorm as TitanRMSNorm
from torchtitan.models.common.rope import RoPE as TitanRoPE
from torchtitan.models.qwen3.model import Qwen3TransformerBlock as TitanTransformerBlock

from mesh.invariant.elementwise import silu_times
from mesh.invariant.linear import gathered_linear
from mesh.invariant.switch import current
from mesh.model.lookup import lookup
from mesh.model.parallel import copy_to, enter, leave, local, own_part


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU gating, silu(gate) * up (arXiv:2002.05202, eq. 5), elementwise on any shape."""
    if gate.is_cuda:
        from mesh.model import triton_elementwise  # needs a GPU driver

        return triton_elementwise.swiglu(gate, up)
    return plain_swiglu(gate, up)


def plain_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in PyTorch operators."""
    switch = current()
    if switch is not None and switch.device_type == "cpu":
        return silu_times(gate, up)
    return F.silu(gate) * up


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dim (arXiv:1910.07467, eq. 4)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x_BTNH: torch.Tensor, rope_TE: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, rotate-half form (arXiv:2104.09864, eq. 34), in fp32.

    rope_TE: [T, 2H] rows of `rope_table`, cosines then sines.
    """
    head_dim = x_BTNH.shape[-1]
    cos_TH, sin_TH = rope_TE[:, None, :head_dim], rope_TE[:, None, head_dim:]
    x = x_BTNH.float()
    half = head_dim // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos_TH + rotated * sin_TH).type_as(x_BTNH)


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, rope_TE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `rotate` to packed queries and keys."""
    if q.is_cuda:
        from mesh.model import triton_elementwise  # needs a GPU driver

        return triton_elementwise.rotate_both(q, k, rope_TE)
    q, k = rotate(torch.cat((q, k), -2), rope_TE).split((q.shape[-2], k.shape[-2]), -2)
    return q, k


class ColumnLinear(TitanLinear):
    """Linear with output features sharded over tp, with or without a bias. Its inputs have gone
    through `enter`. The bias is added to the rounded product, in both roles.

    parts: the heads that the features consist of, where there may be fewer of them than ranks.
    """

    tp_dim = 0

    @dataclass(kw_only=True, slots=True)
    class Config(TitanLinear.Config):
        parts: int | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tp_group: dist.ProcessGroup | None = None
        self.tp_parts = config.parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self._own(self.weight))
        return out if self.bias is None else out + self._own(self.bias)

    def _own(self, parameter: torch.Tensor) -> torch.Tensor:
        return own_part(parameter, self.tp_parts, self.tp_group)


class RowLinear(TitanLinear):
    """Linear that ends a tensor-parallel region: its inputs are sharded over tp, its output is not.

    It is row-parallel: input features are sharded and partial products summed. Built with the
    switch on, it shards output features instead and gathers inputs and outputs: no sum over ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TitanLinear.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tp_group: dist.ProcessGroup | None = None
        self.token_group: dist.ProcessGroup | None = None
        self.tp_dim = 1 if current() is None else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp_group is None:
            return F.linear(x, local(self.weight))
        gathers = self.tp_dim == 0
        assert gathers == (current() is not None), "batch invariance was switched after building"
        if not gathers:
            return leave(F.linear(x, local(self.weight)), self.tp_group, self.token_group)
        to_shards = self.token_group is not None
        return gathered_linear(x, local(self.weight), self.tp_group, to_shards)


class RMSNorm(TitanRMSNorm):
    """RMSNorm of replicated activations, duplicated on every tp rank, or of token shards over
    `token_group`, which then sums the weight's gradient.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TitanRMSNorm.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.token_group: dist.ProcessGroup | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, copy_to(local(self.weight), self.token_group), self.eps)


class HeadRMSNorm(TitanRMSNorm):
    """RMSNorm over the head dim of this rank's heads; sums the weight's gradient over tp."""

    @dataclass(kw_only=True, slots=True)
    class Config(TitanRMSNorm.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tp_group: dist.ProcessGroup | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, copy_to(local(self.weight), self.tp_group), self.eps)


class QKVLinear(TitanQKVLinear):
    """Queries, keys and values of this rank's heads."""

    @dataclass(kw_only=True, slots=True)
    class Config(TitanQKVLinear.Config):
        pass

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (linear(x) for linear in (self.wq, self.wk, self.wv))
        q, k, v = (
            out.view(*x.shape[:-1], out.shape[-1] // self.head_dim, self.head_dim)
            for out in (q, k, v)
        )
        return q, k, v


class FeedForward(TitanFeedForward):
    """SwiGLU feed-forward layer."""

    @dataclass(kw_only=True, slots=True)
    class Config(TitanFeedForward.Config):
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class TransformerBlock(TitanTransformerBlock):
    """Attention and feed-forward layer, each a tensor-parallel region after its norm."""

    @dataclass(kw_only=True, slots=True)
    class Config(TitanTransformerBlock.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tp_group: dist.ProcessGroup | None = None
        self.token_group: dist.ProcessGroup | None = None

    def forward(
        self, x: torch.Tensor, attention_masks: Any, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: [B, T, D], or this rank's token shard. `positions`: rope_TE, for all tokens."""
        assert positions is not None, "`positions` must hold the RoPE rows"
        groups = (len(positions), self.tp_group, self.token_group)
        attended = self.attention(
            enter(self.attention_norm(x), *groups), attention_masks, positions
        )
        x = x + attended
        return x + self.feed_forward(enter(self.ffn_norm(x), *groups))


class Rotary(TitanRoPE):
    """Rotary embedding without its own table: the model gathers the rows once per forward.

    torchtitan's attention passes through what the model gives it as `positions`: here rope_TE.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TitanRoPE.Config):
        pass

    def __init__(self, config: Config) -> None:
        torch.nn.Module.__init__(self)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        pass

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, positions: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate_both(query, key, positions)


class Embedding(TitanEmbedding):
    """Vocabulary-parallel token embedding: zeros for tokens of other ranks' shards.

    The row of `pad_id` does not learn from being looked up, as in `transformers`.
    """

    tp_dim = 0

    @dataclass(kw_only=True, slots=True)
    class Config(TitanEmbedding.Config):
        pad_id: int | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.token_group: dist.ProcessGroup | None = None
        self.pad_id = config.pad_id

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = local(self.weight)
        if self.tp_group is None:
            return lookup(tokens, weight, self.pad_id)
        size = weight.shape[0]
        first = dist.get_rank(self.tp_group) * size
        mine = (tokens >= first) & (tokens < first + size)
        pad_row = None if self.pad_id is None else self.pad_id - first
        pad_row = pad_row if pad_row in range(size) else None
        rows = lookup((tokens - first).clamp(0, size - 1), weight, pad_row)
        rows = rows * mine.unsqueeze(-1).to(rows.dtype)
        return leave(rows, self.tp_group, self.token_group)
