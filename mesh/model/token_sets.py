"""The truncated sets of one forward pass's tokens, for the head.

A set is derived from the logits, by the rule of `truncated.py`. While a batch gives one update it
has to be known only by its end. Under other weights than those that drew the tokens, the ids
themselves have to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from mesh.model.tiles import gather_shards
from mesh.model.truncated import CHUNK, Cut, cut_of, mask_outside, outside
from mesh.model.vocabulary import MASKED
from mesh.types import Distribution

Mask = Callable[[torch.Tensor, int], None]
"""(logits_AV, column): masks what is outside of the sets, in place, in the logits of this rank's
vocabulary shard from `column` on."""


class Listed(NamedTuple):
    """Members of the sets of A rows, by row and id, int32 [N] each."""

    num_rows: int
    row_N: torch.Tensor
    id_N: torch.Tensor

    def inside(self, first: int, last: int) -> torch.Tensor:
        """bool [A, last - first]: the ids from `first` to `last` - 1 that are in the sets."""
        width = last - first
        within_N = (self.id_N >= first) & (self.id_N < last)
        column_N = torch.where(within_N, self.id_N - first, width)  # one column for all others
        found = self.id_N.new_zeros(self.num_rows, width + 1, dtype=torch.bool)
        found[self.row_N.long(), column_N.long()] = True
        return found[:, :width]


class Packed(NamedTuple):
    """Members of the sets of A rows, one bit for each id, uint8 [A, V / 8]."""

    bits_AB: torch.Tensor

    def inside(self, first: int, last: int) -> torch.Tensor:
        """As `Listed.inside`."""
        id_V = torch.arange(first, last, device=self.bits_AB.device)
        return (self.bits_AB[:, id_V >> 3] >> (id_V & 7)) & 1 > 0


def packed(inside_AV: torch.Tensor) -> Packed:
    rows, width = inside_AV.shape
    bytes_ABX = inside_AV.new_zeros(rows, -(-width // 8) * 8, dtype=torch.uint8)
    bytes_ABX[:, :width] = inside_AV
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=inside_AV.device)
    return Packed((bytes_ABX.unflatten(1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8))


def kept(inside_AV: torch.Tensor) -> Listed | Packed:
    """The sets in whichever form is the smaller: an eighth of a byte an id of the vocabulary is the
    most that a token takes.
    """
    rows, width = inside_AV.shape
    members_N2 = inside_AV.nonzero()
    if 8 * len(members_N2) > rows * -(-width // 8):
        return packed(inside_AV)
    row_N, id_N = members_N2.int().unbind(1)
    return Listed(rows, row_N.contiguous(), id_N.contiguous())


class TokenSets:
    """The truncated sets of one pass's tokens, in the order of its loss tokens.

    `keeps`: the first forward pass derives them, and its ids are those of all later ones, whatever
    the weights are by then, and whichever model's logits are masked. Owns these ids, of this rank's
    shard of the vocabulary.
    """

    def __init__(self, distribution: Distribution, keeps: bool = False) -> None:
        assert distribution.truncated, "the set is the whole vocabulary"
        self.distribution, self.keeps = distribution, keeps
        self.ids: list[Listed | Packed] = []

    def mask(
        self,
        logits_of: Callable[[slice], torch.Tensor],
        num_rows: int,
        vocab: int,
        first: int,
        group: dist.ProcessGroup | None,
    ) -> Mask:
        """The mask of this pass. logits_of: from rows to their logits over this rank's shard of the
        vocabulary, whose first id is `first`; vocab: ids of all shards. Collective of the group.
        """
        if self.ids:
            assert sum(_rows(ids) for ids in self.ids) == num_rows, "sets of other tokens"
            return lambda logits_AV, column: _mask_others(logits_AV, column, self.ids)
        cuts = []
        for rows in chunks(num_rows, vocab):
            logits_AV = logits_of(rows)
            cut = cut_of(gather_shards(logits_AV, group), self.distribution)
            cuts.append(cut)
            if self.keeps:
                self.ids.append(kept(~outside(logits_AV, cut, first)))
        cut = Cut(*(torch.cat(parts) for parts in zip(*cuts, strict=True)))
        return lambda logits_AV, column: mask_outside(logits_AV, cut, first + column)


def chunks(num_rows: int, vocab: int) -> list[slice]:
    """Rows whose logits are looked at in one piece; one piece, too, where there are none."""
    size = max(1, CHUNK // vocab)
    return [slice(i, min(i + size, num_rows)) for i in range(0, max(1, num_rows), size)]


def _rows(ids: Listed | Packed) -> int:
    return ids.num_rows if isinstance(ids, Listed) else len(ids.bits_AB)


def _mask_others(logits_AV: torch.Tensor, column: int, parts: Sequence[Listed | Packed]) -> None:
    """Mask what is not among these ids, in place."""
    start = 0
    for ids in parts:
        rows = logits_AV[start : start + _rows(ids)]
        rows.masked_fill_(~ids.inside(column, column + logits_AV.shape[1]), MASKED)
        start += len(rows)
