"""Four gloo ranks that move real FSDP2 + TP weights by `WeightBridge`, in one layout after another.

Each case returns what this rank saw; `DIR/RANK.pt` gets them all, an exception as its text. The
trainer's parameters have the values of `full_weights`, then of `full_weights` times 1.5.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from forked import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mesh.layout.reshard import Block, ParamLayout, layouts_of
from mesh.weights.bridge import WeightBridge, weights_digest

# tok has rows that do not divide; two has fewer than three ranks want; rope is an fp32 buffer
SHAPES = {"tok": (10, 6), "wq": (8, 6), "wo": (6, 8), "two": (2,), "rope": (5, 4), "out": (10, 6)}
TP_DIMS = {"tok": 0, "wq": 0, "wo": 1, "out": 0}
BUFFERS = {"rope"}
TIED = ("out", "tok")
Grid = np.ndarray


def full_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return full | {TIED[1]: full[TIED[0]]}


def role_mesh(grid: Grid) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(grid), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))


def tp_placement(name: str) -> Shard | Replicate:
    return Shard(TP_DIMS[name]) if name in TP_DIMS else Replicate()


def trainer_weights(grid: Grid) -> dict[str, Tensor]:
    """Parameters as TP and then `fully_shard` leave them (a collective over the world)."""
    mesh = role_mesh(grid)
    if mesh.get_coordinate() is None:
        return {}
    module = nn.Module()
    for name, full in full_weights().items():
        if name in BUFFERS:
            module.register_buffer(name, full, persistent=False)
            continue
        value = full.clone()
        if grid.shape[2] > 1:
            value = distribute_tensor(value, mesh["tp"], [tp_placement(name)])
        module.register_parameter(name, nn.Parameter(value))
    module.out = module.tok
    fully_shard(module, mesh=mesh["dp_replicate", "dp_shard"])
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers())


def generator_weights(
    layouts: list[ParamLayout], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Plain local tensors, all ones; `out` is `tok` itself."""
    own = {
        layout.name: torch.ones(
            layout.blocks[rank].size, dtype=torch.float32 if layout.name in BUFFERS else dtype
        )
        for layout in layouts
        if rank in layout.blocks
    }
    return own | {TIED[0]: own[TIED[1]]} if own else {}


def layouts(trainer: Grid, generator: Grid) -> tuple[list[ParamLayout], list[ParamLayout]]:
    return (
        layouts_of(SHAPES, TP_DIMS, trainer, fsdp=True, buffers=BUFFERS),
        layouts_of(SHAPES, TP_DIMS, generator, fsdp=False),
    )


def torch_blocks(source: dict[str, Tensor], rank: int, own: list[ParamLayout]) -> list[str]:
    """Parameters whose block is not where torch itself says the local shard lies."""
    wrong = []
    for layout in own:
        tensor = source.get(layout.name)
        if isinstance(tensor, DTensor):
            size, offset = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            block = Block(tuple(offset), tuple(size))
            expected = block if block.numel else None
            wrong += [layout.name] if layout.blocks.get(rank) != expected else []
    return wrong


def make_bridge(
    trainer: Grid, generator: Grid, dtype: torch.dtype, kind=WeightBridge, **options
) -> WeightBridge:
    rank = dist.get_rank()
    sources, destinations = layouts(trainer, generator)
    return kind(
        trainer_weights(trainer),
        generator_weights(destinations, rank, dtype),
        sources,
        destinations,
        dtype=dtype,
        group=dist.group.WORLD,
        cpu_group=dist.group.WORLD,
        **options,
    )


def unequal(bridge: WeightBridge, factor: float) -> list[str]:
    """Generator tensors whose bits are not those of the full tensor, cast and cut."""
    wrong = []
    for layout in bridge.destination_layouts:
        if bridge.rank in layout.blocks:
            own = bridge.destination[layout.name]
            full = full_weights()[layout.name] * factor
            expected = full.to(own.dtype)[layout.blocks[bridge.rank].slices]
            wrong += [] if torch.equal(own, expected) else [layout.name]
    return wrong


@torch.no_grad()
def train(bridge: WeightBridge) -> None:
    """An optimizer step, in place as those are; tied names have one tensor."""
    for tensor in {id(tensor): tensor for tensor in bridge.source.values()}.values():
        tensor.mul_(1.5)


def reshard(trainer: Grid, generator: Grid, dtype: torch.dtype, **options) -> dict:
    bridge = make_bridge(trainer, generator, dtype, **options)
    if bridge.aliased:
        bridge.bind(bridge.aliases())
    first = bridge.sync()
    wrong = unequal(bridge, 1.0)
    train(bridge)
    second = bridge.sync()
    digest = weights_digest(bridge.source, bridge.source_layouts, dist.group.WORLD)
    return {
        "wrong": wrong + unequal(bridge, 1.5),
        "blocks": torch_blocks(bridge.source, bridge.rank, bridge.source_layouts),
        "reports": [(r.version, r.bytes_moved, r.verified) for r in (first, second)],
        "num_rounds": len(bridge.sends),
        "aliased": bridge.aliased,
        "digest": digest,
    }


class CorruptingBridge(WeightBridge):
    """After the copies, and before they are checked, one bit of rank 3's `wo` flips."""

    def _compare(self, source, destination):
        if self.rank == 3:
            destination["wo"].view(torch.int32)[-1, -1] ^= 1
        super()._compare(source, destination)


def error_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def corrupted() -> dict:
    bridge = make_bridge(grid([0, 1]), grid([2, 3], tp=1), torch.float32, CorruptingBridge)
    return {"error": error_of(bridge.sync)}


def stale_source() -> dict:
    """Rank 1's replica of the trainer misses a step."""
    bridge = make_bridge(grid([0, 1, 2], replicate=3), grid([3]), torch.float32)
    if bridge.rank in (0, 2):
        train(bridge)
    return {"error": error_of(bridge.sync)}


def unbound_alias() -> dict:
    bridge = make_bridge(grid([0, 1, 2, 3], replicate=4), grid([0, 1, 2, 3]), torch.float32)
    return {"error": error_of(bridge.sync)}


def misfits() -> dict:
    """What one rank holds wrongly is refused on all ranks."""
    rank, (sources, destinations) = dist.get_rank(), layouts(grid([0, 1]), grid([2, 3]))
    source, own = trainer_weights(grid([0, 1])), generator_weights(destinations, rank, torch.half)
    groups = {"group": dist.group.WORLD, "cpu_group": dist.group.WORLD}
    if rank == 3:
        own["wq"] = own["wq"].T
        own["wo"] = own["wo"].to("meta")
        own["two"] = own["two"].to(torch.bfloat16)
        own["more"] = own.pop("tok")
    both = (source, own, sources, destinations)
    return {
        "tensors": error_of(lambda: WeightBridge(*both, dtype=torch.half, **groups)),
        "names": error_of(
            lambda: WeightBridge(source, own, sources[1:], destinations, dtype=torch.half, **groups)
        ),
    }


def grid(ranks: list[int], replicate: int = 1, tp: int = 1) -> Grid:
    return np.array(ranks).reshape(replicate, -1, tp)


ALL = [0, 1, 2, 3]
FP32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, Callable[[], dict]] = {
    "split_2_2": lambda: reshard(grid([0, 1]), grid([2, 3], tp=2), BF16, bucket_bytes=64),
    "split_3_1": lambda: reshard(grid([0, 1, 2]), grid([3]), FP32, verify="first"),
    "split_1_3": lambda: reshard(grid([0]), grid([3, 1, 2]), BF16, verify="off"),
    "colocated_2x2_4x1": lambda: reshard(grid(ALL, tp=2), grid(ALL), BF16),
    "colocated_hsdp_2x2": lambda: reshard(grid(ALL, replicate=2), grid(ALL, tp=2), FP32),
    "overlapping": lambda: reshard(grid([0, 1, 2, 3], tp=2), grid([3, 0], tp=2), FP32),
    "aliased": lambda: reshard(grid(ALL, replicate=2, tp=2), grid(ALL, tp=2), FP32),
    "alias_refused": lambda: reshard(grid(ALL, replicate=4), grid(ALL), FP32, allow_alias=False),
    "cast_no_alias": lambda: reshard(grid(ALL, replicate=4), grid(ALL), BF16),
    "corrupted": corrupted,
    "stale_source": stale_source,
    "unbound_alias": unbound_alias,
    "misfits": misfits,
}


def main() -> None:
    dist.init_process_group("gloo")
    results = {}
    for name, case in CASES.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = {"raised": traceback.format_exc()}
    torch.save(results, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(4, main)
