"""What tests share: a world of one rank, for models that are built on a mesh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mesh.layout import AXES


@pytest.fixture(scope="module")
def solo_mesh() -> Iterator[DeviceMesh]:
    """A role's mesh of this process alone; the process group ends with the module."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", torch.zeros(1, 1, 1, dtype=torch.int64), mesh_dim_names=AXES)
    dist.destroy_process_group()
