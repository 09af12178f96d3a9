"""Mesh-independent digest of a set of parameters.

Each element contributes a hash of (parameter name, global flat index, bits); contributions add
modulo 2^64. Addition depends on neither the holder nor the order of elements, so any sharding of
the same bits gives the same sum. Changing a single element always changes it, since the hash is a
bijection of a key that is injective in the bits; any other change is missed with probability 2^-64.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mesh.layout.reshard import Block, ParamLayout

# splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators";
# constants of Vigna's splitmix64.c): the increment spreads indices, MIX_1 and MIX_2 are the
# finaliser's multipliers.
INDEX_STEP = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Spreads the bits; any other odd number would do (this one is from MurmurHash3's finaliser).
BITS_STEP = 0xFF51AFD7ED558CCD

# Elements hashed at a time: bounds the int64 temporaries, and keeps them in cache on a CPU.
CHUNK_CUDA, CHUNK_CPU = 1 << 22, 1 << 16

BITS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def block_digest(
    name: str,
    local: Tensor,
    block: Block,
    global_shape: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Digest of one rank's block of a parameter: an int64 scalar on the tensor's device.

    `local` has shape `block.size`. With `dtype`, digests the values cast to it, without a cast copy
    of the whole block. Empty blocks give 0.
    """
    assert tuple(local.shape) == block.size, f"{name}: {tuple(local.shape)}, not {block.size}"
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    limit = CHUNK_CUDA if local.is_cuda else CHUNK_CPU
    for piece in Block((0,) * local.dim(), block.size).split(limit):
        values = local[piece.slices].detach().to(dtype or local.dtype).contiguous()
        bits = values.view(BITS_OF[values.element_size()]).to(torch.int64, copy=True)
        placed = Block(tuple(map(int.__add__, piece.offset, block.offset)), piece.size)
        keys = _index_keys(placed, global_shape, local.device)
        keys = keys.add_(bits.mul_(_int64(BITS_STEP))).add_(_name_key(name))
        total += _mix_(keys).sum()
    return total


def _index_keys(block: Block, shape: Sequence[int], device: torch.device) -> Tensor:
    """INDEX_STEP times the global flat index of each element of the block."""
    keys = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
    step = INDEX_STEP
    for dim in reversed(range(len(shape))):
        start, size = block.offset[dim], block.size[dim]
        along_dim = torch.arange(start, start + size, device=device) * _int64(step)
        keys = keys + along_dim.view(-1, *(1,) * (len(shape) - dim - 1))
        step *= shape[dim]
    return keys


def _mix_(keys: Tensor) -> Tensor:
    """splitmix64's finaliser, in place on int64."""
    keys = keys.bitwise_xor_(_shift(keys, 30)).mul_(_int64(MIX_1))
    keys = keys.bitwise_xor_(_shift(keys, 27)).mul_(_int64(MIX_2))
    return keys.bitwise_xor_(_shift(keys, 31))


def _shift(keys: Tensor, count: int) -> Tensor:
    # int64 shifts are arithmetic: mask off the sign bits to shift as uint64 does.
    return (keys >> count).bitwise_and_((1 << (64 - count)) - 1)


def _name_key(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _int64(number: int) -> int:
    """The number modulo 2^64, as a signed int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def local_digests(
    tensors: Mapping[str, Tensor],
    layouts: Sequence[ParamLayout],
    rank: int,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, int]:
    """Digest one rank's local `tensors`, cast to `dtypes` if given: block digests by name.

    Parameters of which the rank holds nothing have digest 0."""
    held = [layout for layout in layouts if rank in layout.blocks]
    totals = [
        block_digest(
            layout.name,
            tensors[layout.name],
            layout.blocks[rank],
            layout.shape,
            dtypes[layout.name] if dtypes else None,
        )
        for layout in held
    ]
    # a single copy to the host
    numbers = torch.stack(totals).tolist() if totals else []
    digests = {layout.name: number for layout, number in zip(held, numbers, strict=True)}
    return {layout.name: digests.get(layout.name, 0) for layout in layouts}


def total_digest(layouts: Sequence[ParamLayout], digests: Sequence[Mapping[str, int]]) -> str:
    """Sixteen hex digits for all parameters of a side, the same for any sharding of the same bits.

    `digests[rank][name]` is that rank's block digest. Each distinct block counts once; its replicas
    are assumed equal (`compare_digests` checks that).
    """
    total = sum(
        digests[ranks[0]][layout.name] for layout in layouts for ranks in layout.holders().values()
    )
    return f"{total % (1 << 64):016x}"


def compare_digests(
    layouts_by_side: Mapping[str, Sequence[ParamLayout]],
    digests: Sequence[Mapping[str, Mapping[str, int]]],
) -> list[str]:
    """Compare all ranks' block digests: one message per mismatch, none if the sides are equal.

    `layouts_by_side` holds two sides, the reference first; each side's blocks tile every parameter.
    `digests[rank][side][name]` is a block's digest, by global rank. Every replica is compared. A
    message names the parameter, the side and the ranks at fault, as narrowly as blocks allow:
    replicas against their majority, the second side's blocks against the first's.
    """
    (first, sources), (second, destinations) = layouts_by_side.items()
    by_name = {layout.name: layout for layout in destinations}
    messages = []
    for source in sources:
        name = source.name
        expected = {rank: digests[rank][first][name] for rank in source.blocks}
        mismatches = replica_mismatches(first, name, source.holders(), expected)
        messages += mismatches
        if not mismatches:  # else there is no reference for the second side
            destination = by_name[name]
            values = {rank: digests[rank][second][name] for rank in destination.blocks}
            messages += _differences(first, source, expected, second, destination, values)
    return messages


def replica_mismatches(
    side: str, name: str, holders: Mapping[Block, Sequence[int]], values: Mapping[int, int]
) -> list[str]:
    """One message for each block whose replicas do not have one digest; `values`: by rank."""
    messages = []
    for block, ranks in holders.items():
        counts = Counter(values[rank] for rank in ranks).most_common()
        if len(counts) == 1:
            continue
        # no majority: any replica may be wrong
        tie = counts[0][1] == counts[1][1]
        at_fault = [rank for rank in ranks if tie or values[rank] != counts[0][0]]
        messages.append(
            f"{name}: {side} ranks {at_fault} differ from other replicas of {_format(block)}"
        )
    return messages


def _differences(
    first: str,
    source: ParamLayout,
    reference: Mapping[int, int],
    second: str,
    destination: ParamLayout,
    values: Mapping[int, int],
) -> list[str]:
    messages = []
    unknown = {}
    for block, ranks in destination.holders().items():
        expected = _expected(block, source, reference)
        wrong = [rank for rank in ranks if values[rank] % (1 << 64) != expected]
        if expected is None:
            unknown[block] = ranks
        elif wrong:
            where = f"{second} ranks {wrong} differ from the {first} in {_format(block)}"
            messages.append(f"{source.name}: {where}")
    messages += replica_mismatches(second, source.name, unknown, values)
    if not messages and _sum(source, reference) != _sum(destination, values):
        ranks = sorted(destination.blocks)
        messages.append(f"{source.name}: {second} ranks {ranks} together differ from the {first}")
    return messages


def _expected(block: Block, source: ParamLayout, reference: Mapping[int, int]) -> int | None:
    """Digest of `block` modulo 2^64 if whole source blocks tile it, else None."""
    inside = {
        held: ranks for held, ranks in source.holders().items() if held.intersect(block) == held
    }
    if sum(held.numel for held in inside) != block.numel:
        return None
    return sum(reference[ranks[0]] for ranks in inside.values()) % (1 << 64)


def _sum(layout: ParamLayout, values: Mapping[int, int]) -> int:
    return sum(values[ranks[0]] for ranks in layout.holders().values()) % (1 << 64)


def _format(block: Block) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in block.slices) + "]"
