"""Truncated distributions: the set of ids that top-k and top-p keep, one function for both roles.

Ids are ordered by their logit, equal ones by id. The set is a beginning of that order, so it is
known by its last member: no id has to be listed, and [T, V] need not exist. Where the nucleus ends
is decided by integers: the probability of an id, as a multiple of a power of two, is a polynomial
of its logit in products and sums that every device rounds alike (`masses`), and integers add up to
the same sum in any order. So a set depends on the logits of its row alone: not on the batch, the
vocabulary's shards, the device or the kernel.

Logits outside the set become `MASKED`, like those of ids without a text; whatever reads the logits
afterwards (draws, logprobs, entropies, divergences and their gradients) is that of the truncated
distribution. The set itself is held fixed: no gradient goes through where it ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mesh.model.vocabulary import MASKED
from mesh.types import Distribution

POWERS = (
    0.9999999250635381,
    0.6931530731993272,
    0.24015361705165816,
    0.05582631803174051,
    0.008989340116161069,
    0.0018775766645942283,
)
"""2 ** x for x in 0..1 to a relative 8e-8, as a polynomial (minimax, by Lawson's algorithm)."""

FRACTION = 40  # bits below 1 of a mass: sums over 2^22 ids stay below 2^63
SMALLEST = -41.0  # exponent from which on a mass is 0

CHUNK = 1 << 27  # logits that are looked at in one piece


class Cut(NamedTuple):
    """The last member of each row's set: its logit, fp32 [A], and its id, int64 [A]."""

    logit_A: torch.Tensor
    id_A: torch.Tensor


def masses(logits_AV: torch.Tensor, largest_A1: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp((logits - largest) / temperature) * 2 ** FRACTION, rounded down to int64.

    Every product and sum is of fp32 and rounded on its own. NaN, which has no mass, gives 0.
    """
    exponent = (logits_AV.float() - largest_A1.float()) * scale_of(temperature)
    exponent = torch.where(exponent > SMALLEST, exponent, SMALLEST)
    whole = exponent.floor()
    rest = exponent - whole
    power = torch.full_like(rest, POWERS[-1])
    for factor in POWERS[-2::-1]:
        power = power * rest + factor
    mantissa = (power * 2.0**23).to(torch.int64) << (FRACTION - 23)
    found = mantissa >> whole.neg().to(torch.int64)
    return found.where(exponent > SMALLEST, 0)


def scale_of(temperature: float) -> float:
    """The fp32 factor from differences of logits to exponents of two."""
    scale = torch.tensor(1 / (temperature * math.log(2)), dtype=torch.float32, device="cpu")
    return scale.item()


def plain_cut(logits_AV: torch.Tensor, distribution: Distribution) -> Cut:
    """`cut_of` in PyTorch operators: sorts the whole vocabulary, as the definition says."""
    ordered, ids = logits_AV.float().sort(dim=-1, descending=True, stable=True)
    vocab = ordered.shape[-1]
    most = min(distribution.top_k or vocab, vocab)
    ordered, ids = ordered[:, :most], ids[:, :most]
    place_A1 = torch.full_like(ids[:, :1], most - 1)
    if distribution.top_p < 1:
        mass = masses(ordered, ordered[:, :1], distribution.temperature)
        until = mass.cumsum(-1)
        wanted_A1 = (until[:, -1:].double() * distribution.top_p).long().clamp(min=1)
        place_A1 = ((until - mass) < wanted_A1).sum(-1, keepdim=True) - 1
    return Cut(ordered.gather(1, place_A1)[:, 0], ids.gather(1, place_A1)[:, 0])


def cut_of(logits_AV: torch.Tensor, distribution: Distribution) -> Cut:
    """Where the set of each row ends. logits_AV: of the whole vocabulary, fp32 or bf16, those of
    ids without a text masked.

    The nucleus has the fewest ids, in order, whose mass is at least top_p of the mass of all that
    top_k leaves, rounded down: of ten equal ids, 0.9 are nine. It is never empty.
    """
    if logits_AV.is_cuda:
        from mesh.model import triton_truncated  # needs a GPU driver

        return triton_truncated.cut_of(logits_AV, distribution)
    return plain_cut(logits_AV, distribution)


def outside(logits_AV: torch.Tensor, cut: Cut, first: int) -> torch.Tensor:
    """bool [A, V]: the ids from `first` on that are not in their row's set. NaN is in it, and so is
    everything of a row that ends with NaN: it has to be seen.
    """
    z_AV, last_A1 = logits_AV.float(), cut.logit_A[:, None]
    behind_V = torch.arange(first, first + z_AV.shape[1], device=z_AV.device)
    return (z_AV < last_A1) | ((z_AV == last_A1) & (behind_V > cut.id_A[:, None]))


def mask_outside(logits_AV: torch.Tensor, cut: Cut, first: int) -> None:
    """Set the logits outside of the sets to `MASKED`, in place; `first`: id of the first column."""
    if logits_AV.is_cuda:
        from mesh.model import triton_truncated  # needs a GPU driver

        triton_truncated.mask_outside(logits_AV, cut, first)
    else:
        logits_AV.masked_fill_(outside(logits_AV, cut, first), MASKED)
