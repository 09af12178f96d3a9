"""The digest against its definition in Python integers, on any sharding, and under faults."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.layout.reshard import Block, ParamLayout, layouts_of
from mesh.weights import digest
from mesh.weights.digest import block_digest, compare_digests, local_digests, total_digest

MASK = (1 << 64) - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


def plain_digest(name, full):
    """The definition, for a whole tensor: splitmix64 of (name, index, bits), one at a time."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[full.element_size()]
    total = 0
    for index, bits in enumerate(full.flatten().view(integer).tolist()):
        z = seed + index * 0x9E3779B97F4A7C15 + bits * 0xFF51AFD7ED558CCD & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        total += z ^ z >> 31
    return total & MASK


def whole(tensor):
    return Block((0,) * tensor.dim(), tuple(tensor.shape))


def digest_of(name, tensor):
    return int(block_digest(name, tensor, whole(tensor), tensor.shape)) & MASK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 5), (0, 3)])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_digest_is_its_definition(dtype, shape, chunk, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK_CPU", chunk)
    full = (torch.randn(shape) * 9).to(dtype)
    assert digest_of("layers.0.wq", full) == plain_digest("layers.0.wq", full)


def test_cast_on_the_way_is_the_digest_of_the_cast():
    full = torch.randn(33, 5)
    cast = block_digest("w", full, whole(full), full.shape, dtype=torch.bfloat16)
    assert int(cast) & MASK == plain_digest("w", full.to(torch.bfloat16))


def test_large_indices_count():
    shape, row = (1 << 40, 2), torch.randn(1, 2)
    first, far = (block_digest("w", row, Block((i, 0), (1, 2)), shape) for i in (0, (1 << 40) - 1))
    assert first != far


GRIDS = [(1, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (1, 3, 1), (2, 1, 2), (1, 1, 4)]


def make_sides(shapes, source_grid, destination_grid):
    """Layouts of both sides on one world, and every rank's digests of random equal weights."""
    tp_dims = {name: index % 2 for index, name in enumerate(shapes)}
    grids = [np.arange(math.prod(g)).reshape(g) for g in (source_grid, destination_grid)]
    layouts = {
        "trainer": layouts_of(shapes, tp_dims, grids[0], fsdp=True),
        "generator": layouts_of(shapes, tp_dims, grids[1], fsdp=False),
    }
    full = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors = [
        {side: cut(layouts[side], full, rank) for side in layouts}
        for rank in range(max(grids[0].size, grids[1].size))
    ]
    return layouts, full, tensors


def cut(layouts, full, rank):
    return {
        layout.name: full[layout.name][layout.blocks[rank].slices].clone()
        for layout in layouts
        if rank in layout.blocks
    }


def digests_of(layouts, tensors):
    return [
        {side: local_digests(own[side], layouts[side], rank) for side in layouts}
        for rank, own in enumerate(tensors)
    ]


def side_total(layouts, tensors, side):
    return total_digest(layouts[side], [d[side] for d in digests_of(layouts, tensors)])


SHAPES = {"tok": (10, 6), "wo": (5, 7), "one": (3, 1)}


@given(st.sampled_from(GRIDS), st.sampled_from(GRIDS))
@settings(max_examples=40, deadline=None)
def test_any_sharding_has_the_same_total(source_grid, destination_grid):
    layouts, full, tensors = make_sides(SHAPES, source_grid, destination_grid)
    expected = sum(plain_digest(name, tensor) for name, tensor in full.items()) & MASK
    assert side_total(layouts, tensors, "trainer") == f"{expected:016x}"
    assert side_total(layouts, tensors, "generator") == f"{expected:016x}"
    assert compare_digests(layouts, digests_of(layouts, tensors)) == []


def flip_bit(tensor):
    tensor.view(torch.int32).view(-1)[-1] ^= 1


def swap(tensor):
    flat = tensor.view(-1)
    flat[0], flat[-1] = flat[-1].clone(), flat[0].clone()


def negate_zero(tensor):
    tensor.view(-1)[0] = -0.0 if tensor.view(-1)[0] == 0 else 0.0


@pytest.mark.parametrize("fault", [flip_bit, swap, negate_zero])
@pytest.mark.parametrize("source_grid", GRIDS)
@pytest.mark.parametrize("destination_grid", GRIDS)
def test_a_fault_on_a_generator_rank_is_found_and_named(fault, source_grid, destination_grid):
    layouts, _, tensors = make_sides(SHAPES, source_grid, destination_grid)
    last = math.prod(destination_grid) - 1
    fault(tensors[last]["generator"]["tok"])
    findings = compare_digests(layouts, digests_of(layouts, tensors))
    assert len(findings) == 1
    assert findings[0].startswith("tok: generator ranks ")
    named = findings[0].split("[")[1].split("]")[0].split(", ")
    assert str(last) in named


@pytest.mark.parametrize("destination_grid", [(1, 4, 1), (2, 1, 2)])
def test_a_stale_generator_replica_is_named_alone(destination_grid):
    layouts, _, tensors = make_sides(SHAPES, (1, 1, 2), destination_grid)
    tensors[3]["generator"]["wo"] -= 1e-3
    (finding,) = compare_digests(layouts, digests_of(layouts, tensors))
    assert finding.startswith("wo: generator ranks [3] differ from the trainer in [0:5, ")


def test_a_stale_replica_is_named_by_majority_where_blocks_do_not_nest():
    # a trainer's rows do not tile a generator's columns, so only replicas can be compared by block
    layouts, _, tensors = make_sides({"x": (4, 2), "wo": (4, 6)}, (1, 4, 1), (3, 1, 2))
    tensors[4]["generator"]["wo"] -= 1e-3
    (finding,) = compare_digests(layouts, digests_of(layouts, tensors))
    assert finding.startswith("wo: generator ranks [4] differ from other replicas of [0:4, 0:3]")


def test_trainer_replicas_that_differ_are_named():
    layouts, _, tensors = make_sides(SHAPES, (3, 2, 1), (1, 1, 1))
    flip_bit(tensors[4]["trainer"]["tok"])
    (finding,) = compare_digests(layouts, digests_of(layouts, tensors))
    assert finding.startswith("tok: trainer ranks [4] differ from other replicas of [0:5, 0:6]")


def test_two_trainer_replicas_that_differ_are_both_named():
    layouts, _, tensors = make_sides(SHAPES, (2, 2, 1), (1, 1, 1))
    flip_bit(tensors[2]["trainer"]["tok"])
    (finding,) = compare_digests(layouts, digests_of(layouts, tensors))
    assert finding.startswith("tok: trainer ranks [0, 2] differ")


def test_blocks_in_each_others_place_are_found():
    layouts, _, tensors = make_sides({"x": (4, 6)}, (1, 1, 1), (1, 1, 2))
    one, two = tensors[0]["generator"], tensors[1]["generator"]
    one["x"], two["x"] = two["x"], one["x"]
    (finding,) = compare_digests(layouts, digests_of(layouts, tensors))
    assert finding.startswith("x: generator ranks [0, 1] together differ from the trainer")


def test_parameters_in_each_others_place_are_found():
    layouts, _, tensors = make_sides({"w1": (4, 6), "w3": (4, 6)}, (1, 1, 1), (1, 1, 1))
    own = tensors[0]["generator"]
    own["w1"], own["w3"] = own["w3"], own["w1"]
    findings = compare_digests(layouts, digests_of(layouts, tensors))
    assert [finding.split(":")[0] for finding in findings] == ["w1", "w3"]


def test_a_rank_without_a_block_has_zero():
    layout = ParamLayout("w", (2,), {0: Block((0,), (2,))})
    assert local_digests({}, [layout], rank=1) == {"w": 0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_digesting_leaves_the_weights_alone(dtype):
    full = torch.arange(24.0).reshape(4, 6).to(dtype)
    digest_of("w", full)
    assert torch.equal(full, torch.arange(24.0).reshape(4, 6).to(dtype))
