"""The meshes of split and colocated layouts, checked on four gloo ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from forked import run_ranks
from torch.distributed.tensor import Shard, distribute_tensor

from mesh.config.schema import Conf, GeneratorConf, MeshConf, TrainerConf
from mesh.layout.meshes import AXES, Meshes, build_meshes, coordinate, dp_rank, plan_layout


def _conf(
    mode: str = "colocated",
    trainer: tuple[int, int | None, int] = (1, None, 1),
    generator: tuple[int | None, int] = (None, 1),
) -> Conf:
    """A configuration with trainer (dp_replicate, dp_shard, tp) and generator (dp, tp)."""
    replicate, shard, tp = trainer
    return Conf(
        mesh=MeshConf(mode=mode),  # type: ignore[arg-type]
        trainer=TrainerConf(dp_replicate=replicate, dp_shard=shard, tp=tp),
        generator=GeneratorConf(dp=generator[0], tp=generator[1]),
    )


def _sums(meshes: Meshes, role: str) -> list[int] | None:
    """The sum of global ranks over each axis of a role's mesh; None off it."""
    role_mesh = getattr(meshes, f"{role}_mesh")
    if not getattr(meshes, f"on_{role}"):
        assert coordinate(role_mesh) is None and dp_rank(role_mesh) is None
        return None
    sums = []
    for axis in AXES:
        rank = torch.tensor(meshes.rank)
        dist.all_reduce(rank, group=role_mesh.get_group(axis))
        sums.append(int(rank))
    return sums


def _gathered(value: object) -> list:
    everyone: list = [None] * 4
    dist.all_gather_object(everyone, value)
    return everyone


def _sharded_rows(meshes: Meshes, role: str) -> int | None:
    """Rows that this rank holds of 12 sharded over dp_shard; the whole must come back intact."""
    role_mesh = getattr(meshes, f"{role}_mesh")["dp_shard"]
    if not getattr(meshes, f"on_{role}"):
        return None
    rows = distribute_tensor(torch.arange(12.0).view(12, 1), role_mesh, [Shard(0)])
    assert torch.equal(rows.full_tensor(), torch.arange(12.0).view(12, 1))
    return rows.to_local().shape[0]


def _check_two_plus_two() -> None:
    layout = plan_layout(_conf("split", (1, None, 1), (None, 2)), 4)
    meshes = build_meshes(layout, "cpu")
    assert meshes.world_mesh.mesh.tolist() == [0, 1, 2, 3]
    assert _gathered(_sums(meshes, "trainer")) == [[0, 1, 0], [1, 1, 1], None, None]
    assert _gathered(_sums(meshes, "generator")) == [None, None, [2, 2, 5], [3, 3, 5]]
    assert _gathered(coordinate(meshes.trainer_mesh)) == [(0, 0, 0), (0, 1, 0), None, None]
    assert _gathered(coordinate(meshes.generator_mesh)) == [None, None, (0, 0, 0), (0, 0, 1)]
    assert _gathered(_sharded_rows(meshes, "trainer")) == [6, 6, None, None]


def _check_three_plus_one() -> None:
    layout = plan_layout(_conf("split", (1, 3, 1)), 4)
    meshes = build_meshes(layout, "cpu")
    assert _gathered(_sums(meshes, "trainer")) == [[0, 3, 0], [1, 3, 1], [2, 3, 2], None]
    assert _gathered(_sums(meshes, "generator")) == [None, None, None, [3, 3, 3]]
    assert _gathered(dp_rank(meshes.trainer_mesh)) == [0, 1, 2, None]
    assert _gathered(_sharded_rows(meshes, "trainer")) == [4, 4, 4, None]
    assert _gathered(_sharded_rows(meshes, "generator")) == [None, None, None, 12]


def _check_colocated() -> None:
    layout = plan_layout(_conf("colocated", (1, None, 2), (None, 1)), 4)
    meshes = build_meshes(layout, "cpu")
    assert meshes.on_trainer and meshes.on_generator
    assert meshes.trainer_mesh.mesh.tolist() == [[[0, 1], [2, 3]]]
    assert _gathered(_sums(meshes, "trainer")) == [[0, 2, 1], [1, 4, 1], [2, 2, 5], [3, 4, 5]]
    assert _gathered(_sums(meshes, "generator")) == [[6, n, n] for n in range(4)]
    assert _gathered(dp_rank(meshes.trainer_mesh)) == [0, 0, 1, 1]
    assert _gathered(dp_rank(meshes.generator_mesh)) == [0, 1, 2, 3]
    equal = plan_layout(_conf("colocated", (2, 1, 2), (2, 2)), 4)
    meshes = build_meshes(equal, "cpu")
    assert meshes.trainer_mesh is meshes.generator_mesh
    assert _gathered(dp_rank(meshes.trainer_mesh)) == [0, 0, 1, 1]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _check_two_plus_two()
    _check_three_plus_one()
    _check_colocated()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(4, main)
