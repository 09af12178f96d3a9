"""Layouts and plans against the plain way: cut a full tensor with `torch.chunk`, copy, compare."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.layout.reshard import (
    ALIGNMENT,
    Block,
    ParamLayout,
    buckets,
    check_tiling,
    layouts_of,
    plan,
    shard_blocks,
)

WORLD = 8
GRIDS = [(1, 1, 1), (1, 2, 1), (1, 3, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1), (1, 5, 1), (2, 2, 2)]


@st.composite
def shardings(draw, num_dims):
    """A grid of ranks out of the world, and splits over some of its axes in any order."""
    grid_shape = draw(st.sampled_from(GRIDS))
    ranks = draw(st.permutations(range(WORLD)))[: math.prod(grid_shape)]
    axes = draw(st.permutations(range(3)))[: draw(st.integers(0, 3))] if num_dims else []
    splits = [(axis, draw(st.integers(0, num_dims - 1))) for axis in axes]
    return np.array(ranks).reshape(grid_shape), splits


@st.composite
def reshards(draw):
    """Some parameters, each with a shape (dims smaller than the grid too) and two shardings."""
    cases = []
    for index in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        two = draw(shardings(len(shape))), draw(shardings(len(shape)))
        cases.append((f"p{index}", shape, *two))
    return cases


def chunked(full, grid, splits):
    """The specification: each rank's part by torch.chunk, empty where there is no chunk left."""
    parts = {}
    for coordinate in np.ndindex(*grid.shape):
        part = full
        for axis, dim in splits:
            chunks = torch.chunk(part, grid.shape[axis], dim)
            index = coordinate[axis]
            part = chunks[index] if index < len(chunks) else part.narrow(dim, 0, 0)
        parts[int(grid[coordinate])] = part
    return parts


def layout(name, shape, sharding):
    return ParamLayout(name, shape, shard_blocks(shape, *sharding))


@given(reshards())
@settings(max_examples=200, deadline=None)
def test_blocks_are_where_chunk_puts_them(cases):
    for _, shape, sharding, _ in cases:
        full = torch.arange(math.prod(shape)).reshape(shape)
        blocks = shard_blocks(shape, *sharding)
        for rank, part in chunked(full, *sharding).items():
            if part.numel():
                assert torch.equal(full[blocks[rank].slices], part)
            else:
                assert rank not in blocks


def execute(copies, sources, destinations):
    """Copy, and count how often each destination element was written."""
    writes = {key: torch.zeros_like(tensor) for key, tensor in destinations.items()}
    for copy in copies:
        key = (copy.name, copy.dst_rank)
        values = sources[copy.name, copy.src_rank][copy.source.slices]
        destinations[key][copy.destination.slices] = values
        writes[key][copy.destination.slices] += 1
    return writes


def check_reshard(cases, copies):
    sources, wanted = {}, {}
    for name, shape, src, dst in cases:
        full = torch.randint(1 << 40, shape)
        sources |= {(name, rank): part for rank, part in chunked(full, *src).items()}
        wanted |= {(name, rank): part for rank, part in chunked(full, *dst).items()}
    destinations = {key: torch.full_like(part, -1) for key, part in wanted.items()}
    writes = execute(copies, sources, destinations)
    for key, part in wanted.items():
        assert torch.equal(destinations[key], part)
        assert (writes[key] == 1).all()


def plan_of(cases):
    src = [layout(name, shape, sharding) for name, shape, sharding, _ in cases]
    dst = [layout(name, shape, sharding) for name, shape, _, sharding in reversed(cases)]
    return plan(src, dst)


@given(reshards())
@settings(max_examples=300, deadline=None)
def test_plan_writes_every_element_once_with_the_right_value(cases):
    check_reshard(cases, plan_of(cases))


@given(reshards(), st.integers(ALIGNMENT, 400))
@settings(max_examples=300, deadline=None)
def test_buckets_carry_all_remote_copies_within_the_limit(cases, limit):
    copies = plan_of(cases)
    itemsizes = {name: 2 << index for index, (name, *_) in enumerate(cases)}
    rounds = buckets(copies, itemsizes, limit)
    parts = [copy for messages in rounds for message in messages for copy in message.copies]
    local = [copy for copy in copies if copy.src_rank == copy.dst_rank]
    check_reshard(cases, local + parts)
    for messages in rounds:
        assert len({(m.src_rank, m.dst_rank) for m in messages}) == len(messages)
        sent, received = Counter(), Counter()
        for message in messages:
            assert message.src_rank != message.dst_rank
            for copy in message.copies:
                assert (copy.src_rank, copy.dst_rank) == (message.src_rank, message.dst_rank)
                sent[copy.src_rank] += copy.slot_bytes(itemsizes[copy.name])
                received[copy.dst_rank] += copy.slot_bytes(itemsizes[copy.name])
        assert max([*sent.values(), *received.values()]) <= limit


@given(reshards())
@settings(max_examples=100, deadline=None)
def test_a_rank_that_holds_a_piece_copies_it_locally(cases):
    sharding = {name: src for name, _, src, _ in cases}
    shapes = {name: shape for name, shape, *_ in cases}
    for copy in plan_of(cases):
        blocks = shard_blocks(shapes[copy.name], *sharding[copy.name])
        sender = blocks[copy.src_rank]
        if copy.dst_rank in blocks and blocks[copy.dst_rank] == sender:
            assert copy.src_rank == copy.dst_rank


def test_replicas_share_the_sending():
    replicated = {rank: Block((0,), (6,)) for rank in range(3)}
    wanted = {rank: Block((0,), (6,)) for rank in range(3, 8)}
    names = [f"p{i}" for i in range(6)]
    src = [ParamLayout(name, (6,), replicated) for name in names]
    dst = [ParamLayout(name, (6,), wanted) for name in names]
    sent = Counter(copy.src_rank for copy in plan(src, dst))
    assert sent == {0: 10, 1: 10, 2: 10}


def test_buckets_fill_up_before_a_new_round_starts():
    src = [ParamLayout("w", (64,), {0: Block((0,), (64,))})]
    dst = [ParamLayout("w", (64,), {1: Block((0,), (64,))})]
    sizes = [
        [copy.numel for message in messages for copy in message.copies]
        for messages in buckets(plan(src, dst), {"w": 4}, 100)
    ]
    assert sizes == [[24], [24], [16]]


def test_small_copies_share_a_round():
    here, there = ({rank: Block((0,), (4,))} for rank in range(2))
    names = [f"p{i}" for i in range(10)]
    copies = plan(*([ParamLayout(n, (4,), side) for n in names] for side in (here, there)))
    rounds = buckets(copies, dict.fromkeys(names, 4), 64)
    assert [len(message.copies) for messages in rounds for message in messages] == [4, 4, 2]


WHOLE = {0: Block((0, 0), (4, 2))}
HOLE = {0: Block((0, 0), (2, 2)), 1: Block((3, 0), (1, 2))}
OVERLAP = {0: Block((0, 0), (3, 2)), 1: Block((2, 0), (2, 2))}
OVERLAP_AND_HOLE = {0: Block((0, 0), (3, 2)), 1: Block((2, 0), (1, 2))}
OUTSIDE = {0: Block((1, 0), (4, 2))}


@pytest.mark.parametrize("blocks", [HOLE, OVERLAP, OVERLAP_AND_HOLE, OUTSIDE, {}])
def test_a_source_that_does_not_tile_is_refused(blocks):
    with pytest.raises(ValueError, match="wo.weight"):
        plan([ParamLayout("wo.weight", (4, 2), blocks)], [ParamLayout("wo.weight", (4, 2), WHOLE)])


def test_different_names_and_shapes_are_refused():
    one = [ParamLayout("a", (4, 2), WHOLE), ParamLayout("b", (4, 2), WHOLE)]
    two = [ParamLayout("c", (4, 2), WHOLE), ParamLayout("b", (2, 4), {0: Block((0, 0), (2, 4))})]
    with pytest.raises(ValueError) as error:
        plan(one, two)
    for text in (
        "a is missing from the dest",
        "c is missing from the source",
        "b has shape (4, 2)",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="a is listed twice"):
        plan([one[0], one[0]], [one[0]])


def test_a_bucket_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="15 bytes"):
        buckets([], {}, 15)


def test_layouts_of_a_trainer_shards_tp_first_then_fsdp():
    grid = np.arange(8).reshape(2, 2, 2)
    shapes = {"wq": (6, 4), "wo": (4, 6), "norm": (3,), "rope": (5, 2)}
    tp_dims = {"wq": 0, "wo": 1, "norm": None}
    norm, rope, wo, wq = layouts_of(shapes, tp_dims, grid, fsdp=True, buffers={"rope"})
    assert [norm.name, rope.name, wo.name, wq.name] == ["norm", "rope", "wo", "wq"]
    # rank = replica * 4 + shard * 2 + tp; tp halves 6 rows to 3, fsdp cuts those to 2 and 1
    assert [wq.blocks[r].offset[0] for r in range(4)] == [0, 3, 2, 5]
    assert [wq.blocks[r].size for r in range(4)] == [(2, 4), (2, 4), (1, 4), (1, 4)]
    assert wo.blocks[3] == wo.blocks[7] == Block((2, 3), (2, 3))
    assert norm.blocks[0] == norm.blocks[1] == Block((0,), (2,))
    assert norm.blocks[2] == Block((2,), (1,))
    assert all(rope.blocks[r] == Block((0, 0), (5, 2)) for r in range(8))


def test_layouts_of_a_generator_replicate_over_dp():
    (wq,) = layouts_of({"wq": (5, 4)}, {"wq": 0}, [[[4, 5], [6, 7]]], fsdp=False)
    assert wq.blocks[4] == wq.blocks[6] == Block((0, 0), (3, 4))
    assert wq.blocks[5] == wq.blocks[7] == Block((3, 0), (2, 4))


def test_ranks_share_the_parts_of_a_weight_that_has_fewer_than_there_are_ranks():
    """Two kv heads of two rows on four ranks: each has the one that its queries use."""
    grid = [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    (wk,) = layouts_of({"wk": (4, 3)}, {"wk": 0}, grid, fsdp=False, tp_parts={"wk": 2})
    first, second = Block((0, 0), (2, 3)), Block((2, 0), (2, 3))
    assert [wk.blocks[rank] for rank in range(8)] == [first, first, second, second] * 2
    check_tiling(wk)
    whole = layouts_of({"wk": (4, 3)}, {}, [[[8]]], fsdp=False)
    copies = plan(whole, [wk])
    assert {(c.dst_rank, c.source.offset) for c in copies} == {
        (rank, wk.blocks[rank].offset) for rank in range(8)
    }
