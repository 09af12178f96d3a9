"""Layouts of sharded parameters, and the copies that turn one layout into another.

A rank holds one hyper-rectangle of each parameter (a `Block`), or nothing: FSDP and TP produce no
other shards. So resharding is intersecting blocks. Everything here is pure arithmetic on shapes and
ranks: every rank derives the same plan from the same layouts without communication. Ranks are
global ranks.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

# Slots of a message start at multiples of this, so that any dtype can be viewed in place.
ALIGNMENT = 16


@dataclass(frozen=True)
class Block:
    """A hyper-rectangle: `offset[d] <= index[d] < offset[d] + size[d]` in every dim d."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Slices that index this block in a tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.size, strict=True))

    def within(self, outer: Block) -> Block:
        """This block in the local coordinates of a rank that holds `outer`."""
        offset = tuple(o - base for o, base in zip(self.offset, outer.offset, strict=True))
        return Block(offset, self.size)

    def intersect(self, other: Block) -> Block:
        """The common block; its numel is 0 if there is none."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = map(min, self._end(), other._end())
        return Block(offset, tuple(max(0, e - o) for o, e in zip(offset, ends, strict=True)))

    def narrow(self, dim: int, start: int, length: int) -> Block:
        """Elements `start` to `start + length` of `dim`, counted from this block's own offset."""
        offset, size = list(self.offset), list(self.size)
        offset[dim], size[dim] = offset[dim] + start, length
        return Block(tuple(offset), tuple(size))

    def chunk(self, dim: int, count: int, index: int) -> Block:
        """Part `index` of `count` along `dim`, as `torch.chunk` splits: the part size is rounded
        up, so that the last parts may be smaller or empty."""
        length = -(-self.size[dim] // count)
        start = min(index * length, self.size[dim])
        return self.narrow(dim, start, min(length, self.size[dim] - start))

    def split(self, limit: int) -> Iterator[Block]:
        """Split into parts of at most `limit` elements, along the leading dims first."""
        if self.numel <= limit:
            if self.numel:
                yield self
            return
        dim = next(d for d, size in enumerate(self.size) if size > 1)
        rows = max(1, limit // (self.numel // self.size[dim]))
        for start in range(0, self.size[dim], rows):
            length = min(rows, self.size[dim] - start)
            yield from self.narrow(dim, start, length).split(limit)

    def _end(self) -> Iterator[int]:
        return (o + s for o, s in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class ParamLayout:
    """One parameter's global shape and each rank's block; ranks without one hold nothing."""

    name: str
    shape: tuple[int, ...]
    blocks: Mapping[int, Block]

    def holders(self) -> dict[Block, list[int]]:
        """Distinct blocks, each with the ranks (ascending) that hold a replica of it."""
        ranks: dict[Block, list[int]] = defaultdict(list)
        for rank in sorted(self.blocks):
            ranks[self.blocks[rank]].append(rank)
        return dict(ranks)


@dataclass(frozen=True)
class Copy:
    """Elements copied from one rank to another, or within a rank.

    `source` and `destination` are blocks of equal size in the two ranks' local coordinates.
    """

    name: str
    src_rank: int
    dst_rank: int
    source: Block
    destination: Block

    @property
    def numel(self) -> int:
        return self.source.numel

    def slot_bytes(self, itemsize: int) -> int:
        """Bytes that this copy occupies in a message."""
        return -(-self.numel * itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Message:
    """One rank's data for another in one round: the slots of its copies, back to back."""

    src_rank: int
    dst_rank: int
    copies: tuple[Copy, ...]


def shard_blocks(
    shape: Sequence[int],
    ranks_grid: ArrayLike,
    splits: Sequence[tuple[int, int]],
    parts: int | None = None,
) -> dict[int, Block]:
    """Each rank's block of a tensor of `shape`, by global rank; ranks left with nothing are absent.

    `ranks_grid` has one array axis per mesh axis. `splits` lists (mesh axis, tensor dim) in order
    of application: each splits what the earlier ones left, as TP and then FSDP2 do. Mesh axes not
    listed replicate. `parts`: of the first split, where several ranks in a row have the same one.
    """
    grid = np.asarray(ranks_grid)
    blocks = {}
    for coordinate in np.ndindex(*grid.shape):
        block = Block((0,) * len(shape), tuple(shape))
        for number, (axis, dim) in enumerate(splits):
            size, index = grid.shape[axis], coordinate[axis]
            count = parts if parts is not None and number == 0 else size
            block = block.chunk(dim, count, index * count // size)
        if block.numel:
            blocks[int(grid[coordinate])] = block
    return blocks


def layouts_of(
    shapes: Mapping[str, Sequence[int]],
    tp_dims: Mapping[str, int | None],
    grid: ArrayLike,
    fsdp: bool,
    buffers: Collection[str] = (),
    tp_parts: Mapping[str, int] | None = None,
) -> list[ParamLayout]:
    """One role's layouts, sorted by name, on ranks `grid[dp_replicate, dp_shard, tp]`.

    `tp_dims`: the tensor dim that TP shards (absent or None: replicated). With `fsdp`, dim 0 of the
    TP shard is sharded over dp_shard, except for `buffers`, which FSDP leaves whole. `tp_parts`:
    parts of the weights that have fewer than there are tp ranks.
    """
    layouts: list[ParamLayout] = []
    parts = tp_parts or {}
    for name in sorted(shapes):
        tp_dim = tp_dims.get(name)
        splits = [] if tp_dim is None else [(2, tp_dim)]
        if fsdp and name not in buffers:
            splits.append((1, 0))
        shape = tuple(shapes[name])
        layouts.append(ParamLayout(name, shape, shard_blocks(shape, grid, splits, parts.get(name))))
    return layouts


def check_tiling(layout: ParamLayout) -> None:
    """Raise `ValueError` unless the distinct blocks hold every element exactly once."""
    blocks = sorted(layout.holders(), key=lambda block: block.offset)
    whole = Block((0,) * len(layout.shape), layout.shape)
    if any(block.intersect(whole) != block for block in blocks):
        raise ValueError(f"{layout.name}: a block exceeds the shape {layout.shape}")
    for i, block in enumerate(blocks):
        for other in blocks[i + 1 :]:
            if other.offset[:1] >= tuple(block._end())[:1]:
                break
            if block.intersect(other).numel:
                raise ValueError(f"{layout.name}: blocks {block} and {other} overlap")
    held = sum(block.numel for block in blocks)
    if held != whole.numel:
        raise ValueError(f"{layout.name}: ranks hold {held} of {whole.numel} elements")


def plan(src: Sequence[ParamLayout], dst: Sequence[ParamLayout]) -> list[Copy]:
    """Plan the copies that fill every destination block, each element exactly once.

    A rank that holds a wanted piece itself copies it locally. Otherwise the replica with the least
    to send so far sends it. Raises `ValueError` naming the parameter if names or shapes of the two
    sides differ, or if the source does not hold every element exactly once.
    """
    destinations = {layout.name: layout for layout in dst}
    check_same_parameters(src, dst)
    load: Counter[int] = Counter()
    copies: list[Copy] = []
    for source in src:
        check_tiling(source)
        copies.extend(_param_copies(source, destinations[source.name], load))
    return copies


def check_same_parameters(src: Sequence[ParamLayout], dst: Sequence[ParamLayout]) -> None:
    """Raise `ValueError` unless both sides list the same names with the same shapes."""
    shapes = {layout.name: layout.shape for layout in src}
    other = {layout.name: layout.shape for layout in dst}
    problems = [f"{name} is missing from the source" for name in sorted(other.keys() - shapes)]
    problems += [
        f"{name} is missing from the destination" for name in sorted(shapes.keys() - other)
    ]
    problems += [
        f"{name} has shape {shapes[name]} in the source and {other[name]} in the destination"
        for name in sorted(shapes.keys() & other.keys())
        if shapes[name] != other[name]
    ]
    for side, layouts in (("source", src), ("destination", dst)):
        counts = Counter(layout.name for layout in layouts)
        problems += [f"{name} is listed twice in the {side}" for name in counts if counts[name] > 1]
    if problems:
        raise ValueError("layouts do not match: " + "; ".join(problems))


def _param_copies(
    source: ParamLayout, destination: ParamLayout, load: Counter[int]
) -> Iterator[Copy]:
    holders = source.holders()
    for wanted, dst_ranks in destination.holders().items():
        for held, src_ranks in holders.items():
            piece = held.intersect(wanted)
            if not piece.numel:
                continue
            for dst_rank in dst_ranks:
                src_rank = _sender(src_ranks, dst_rank, load)
                load[src_rank] += piece.numel * (src_rank != dst_rank)
                yield Copy(
                    source.name, src_rank, dst_rank, piece.within(held), piece.within(wanted)
                )


def _sender(src_ranks: Sequence[int], dst_rank: int, load: Counter[int]) -> int:
    if dst_rank in src_ranks:
        return dst_rank
    return min(src_ranks, key=lambda rank: (load[rank], rank))


def buckets(
    copies: Iterable[Copy], itemsizes: Mapping[str, int], limit_bytes: int
) -> list[list[Message]]:
    """Group the copies between different ranks into rounds of messages, one per pair of ranks.

    In a round no rank sends or receives more than `limit_bytes` over all its peers, which bounds
    memory whatever the number of ranks. `itemsizes`: each parameter's bytes per element on the
    wire. Copies that are too large are split. Raises `ValueError` for a limit below 16.
    """
    limit = limit_bytes // ALIGNMENT * ALIGNMENT
    if limit <= 0:
        raise ValueError(f"a bucket of {limit_bytes} bytes is too small; use at least {ALIGNMENT}")
    rounds: list[dict[tuple[int, int], list[Copy]]] = []
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for copy in _split(copies, itemsizes, limit):
        size = copy.slot_bytes(itemsizes[copy.name])
        fits = max(sent[copy.src_rank], received[copy.dst_rank]) + size <= limit
        if not rounds or not fits:
            rounds.append(defaultdict(list))
            sent.clear()
            received.clear()
        rounds[-1][copy.src_rank, copy.dst_rank].append(copy)
        sent[copy.src_rank] += size
        received[copy.dst_rank] += size
    return [[Message(*pair, tuple(parts)) for pair, parts in sorted(r.items())] for r in rounds]


def _split(copies: Iterable[Copy], itemsizes: Mapping[str, int], limit: int) -> Iterator[Copy]:
    for copy in copies:
        if copy.src_rank == copy.dst_rank:
            continue
        numel = limit // itemsizes[copy.name]
        parts = zip(copy.source.split(numel), copy.destination.split(numel), strict=True)
        for source, destination in parts:
            yield replace(copy, source=source, destination=destination)
