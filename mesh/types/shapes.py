"""A model by its sizes, and what else its maths depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IdSpans = tuple[tuple[int, int], ...]
"""Token ids as half-open spans (first, last), in order."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of RoPE's frequencies beyond the context that a model was pretrained on.

    linear: all are divided by `factor`. llama3: those whose wavelength is above `original_positions
    / low_freq_factor` are; below `original_positions / high_freq_factor` they stay; in between they
    are interpolated.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """A model by its sizes, which a layout has to divide, and what else its maths depends on.

    `max_positions`: the longest context it was made for; `pad_id`: the token whose embedding does
    not learn from being looked up (None: there is none); `textless`: ids for which the tokenizer
    has no token, whose probability is exactly 0; `family`: its model_type in a config.json;
    `qk_norm`: queries and keys are normed; `qkv_bias`: q, k and v have biases.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = True
    max_positions: int = 32768
    pad_id: int | None = None
    textless: IdSpans = ()
    family: str = "qwen3"
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None

    def kv_heads_of_rank(self, tp: int) -> int:
        """The kv heads of one of `tp` ranks. Several may share one."""
        return max(self.num_kv_heads // tp, 1)
