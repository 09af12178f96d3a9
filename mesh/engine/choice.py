"""Shared by all engines that run the trainer's policy: their weights, and the next token of every
sequence with its logprob, over the trainer's own vocabulary tiles.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mesh.engine.sampler import draw, truncated
from mesh.model.logprobs import score_tiles
from mesh.model.parallel import adopt, local
from mesh.model.policy import Policy, named_weights
from mesh.model.tiles import gather_shards, shard_of
from mesh.model.vocabulary import mask_ids, vocab_products, vocab_tiles
from mesh.types import IdSpans, Sampling


def live_weights(model: Policy) -> dict[str, torch.Tensor]:
    """Live local shards by torchtitan's names, tied weights under each; buffers included."""
    return {name: local(tensor.detach()) for name, tensor in _named(model).items()}


def adopt_weights(model: Policy, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let these local tensors, of the same shapes and dtypes, be the model's own."""
    for name, mine in _named(model).items():
        adopt(model, name, mine, tensors[name])


def _named(model: Policy) -> dict[str, torch.Tensor]:
    return {**named_weights(model), **dict(model.named_buffers())}


def tile_logits(
    hidden_SD: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Logits [S, V / shards] of this rank's vocabulary shard, by the trainer's products."""
    _, num_shards = shard_of(group)
    pieces = vocab_products(len(weight), num_shards)
    logits = [F.linear(hidden_SD, weight[edges[0] : edges[-1]]) for edges in pieces]
    return logits[0] if len(logits) == 1 else torch.cat(logits, -1)


def choose(
    logits_SV: torch.Tensor,
    keys_S: torch.Tensor,
    sampling: Sampling,
    group: dist.ProcessGroup | None,
    textless: IdSpans,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_S, logprobs_S), by the trainer's logprob function over the same tiles.

    logits_SV: this rank's vocabulary shard of logits; keys_S: `sampler.token_keys`. Consumes the
    logits: those of `textless` ids are overwritten, and never drawn. Logprobs are those of
    `Sampling.scored`.
    """
    shard, num_shards = shard_of(group)
    first = shard * logits_SV.shape[-1]
    mask_ids(logits_SV, textless, first)
    temperature = sampling.temperature or 1.0
    tiles = vocab_tiles(logits_SV.shape[-1] * num_shards, num_shards)
    drawn_SV = truncated(logits_SV, sampling, group)
    tokens_S = draw(drawn_SV, keys_S, sampling, group, temperature)
    scored_SV = drawn_SV if sampling.truncated_logprobs else logits_SV
    pieces = [([0, *(last for _, last in tiles)], scored_SV)]
    scores = score_tiles(pieces, tokens_S - first, temperature, group, with_entropy=False)
    return tokens_S, scores[0]


def whole_logprobs(
    logits_SV: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    textless: IdSpans,
) -> torch.Tensor:
    """Logprobs of every id, fp32 [S, V], with the bits that `choose` gives the drawn one.

    logits_SV: this rank's vocabulary shard of logits. Consumes them, as `choose` does.
    """
    shard, num_shards = shard_of(group)
    mask_ids(logits_SV, textless, shard * logits_SV.shape[-1])
    tiles = vocab_tiles(logits_SV.shape[-1] * num_shards, num_shards)
    pieces = [([0, *(last for _, last in tiles)], logits_SV)]
    nobody_S = torch.zeros(len(logits_SV), dtype=torch.int64, device=logits_SV.device)
    logsumexp_S = score_tiles(pieces, nobody_S, temperature, group, with_entropy=False)[2]
    return gather_shards(logits_SV.float() / temperature - logsumexp_S[:, None], group)
