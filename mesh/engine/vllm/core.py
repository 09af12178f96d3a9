"""vLLM's engine core inside this process, with its groups on one replica's ranks alone.

vLLM builds its groups over the default process group and destroys that at its end. So the replica's
group is the default one while vLLM starts, and its groups are destroyed here instead. vLLM is also
kept from changing the process: its random states, its threads, and the NUMA node that all its
memory would be bound to.
"""

from __future__ import annotations

import gc
import json
import os
import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupMember
from vllm.config import VllmConfig
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models import ModelRegistry
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from mesh.engine.vllm.fused import unpacked
from mesh.engine.vllm.scheduler import DecodeScheduler
from mesh.engine.vllm.titan import ARCHITECTURE, TitanModel

SHM = Path("/dev/shm")
PREFIX = "mesh-vllm"

LOAD_FORMAT = "mesh"
_users: list[EngineCore] = []
"""Engine cores of this process, which share vLLM's groups."""


@register_model_loader(LOAD_FORMAT)
class NoWeights(BaseModelLoader):
    """Build the model and read nothing: the weight bridge writes every weight."""

    def download_model(self, model_config: Any) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        pass

    def load_model(
        self, vllm_config: VllmConfig, model_config: Any, prefix: str = ""
    ) -> torch.nn.Module:
        if model_config.architectures == [ARCHITECTURE]:
            return self.create_model(vllm_config, model_config, prefix).eval()
        with unpacked():
            return super().load_model(vllm_config, model_config, prefix)


class InReplica(ExecutorWithExternalLauncher):
    """vLLM's external launcher with this rank's position in the replica instead of in the world."""

    position: tuple[str, int, int] = ("", 0, 0)
    """(init method, rank, local rank)"""

    def _distributed_args(self) -> tuple[str, int, int]:
        return self.position


def start_core(
    entries: Mapping[str, Any], options: Mapping[str, Any], group: dist.ProcessGroup, device: int
) -> EngineCore:
    """An engine core of a model that `entries` (a config.json) describes. Collective of `group`.

    options: of EngineArgs; group: the replica's tp ranks; device: this rank's index on its host.
    """
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, TitanModel)
    remove_stale_segments()
    name = segment_name(group)
    with TemporaryDirectory() as directory, as_default(group), kept_state():
        (Path(directory) / "config.json").write_text(json.dumps(dict(entries)))
        arguments = EngineArgs(
            model=directory,
            skip_tokenizer_init=True,
            load_format=LOAD_FORMAT,
            generation_config="vllm",
            tensor_parallel_size=group.size(),
            distributed_executor_backend="external_launcher",
            disable_log_stats=True,
            scheduler_cls=DecodeScheduler,
            **options,
        )
        position = (f"mesh:{name}", group.rank(), device)
        executor = type("InReplica", (InReplica,), {"position": position})
        core = EngineCore(arguments.create_engine_config(), executor, log_stats=False)
    remove_segments(name)  # all ranks have mapped them, so that no end can leave them behind
    _users.append(core)
    return core


def stop_core(core: EngineCore) -> None:
    """Shut a core down as EngineCore.shutdown does, but keep the program's process groups."""
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    _users.remove(core)
    if not _users:
        parallel_state.destroy_model_parallel()
        world = parallel_state._WORLD
        if world is not None:
            world.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None


@contextmanager
def as_default(group: dist.ProcessGroup) -> Iterator[None]:
    """Make `group` the default process group for a block.

    Groups made in the block get names from a range of their own: torch names groups by a counter,
    which ranks outside `group` do not advance.
    """
    world, c10d = GroupMember.WORLD, dist.distributed_c10d._world
    count = c10d.group_count
    c10d.group_count = 10**9 + zlib.crc32(group.group_name.encode()) * 1000
    while str(c10d.group_count) in c10d.pg_names.values():
        c10d.group_count += 100
    GroupMember.WORLD = group
    try:
        yield
    finally:
        GroupMember.WORLD = world
        c10d.group_count = count


@contextmanager
def kept_state() -> Iterator[None]:
    """Restore random states and threads after a block, and bind no memory to a NUMA node in it."""
    states, set_num_threads = (random.getstate(), np.random.get_state()), torch.set_num_threads
    operators: Any = torch.ops._C
    bind = getattr(operators, "init_cpu_memory_env", None)
    try:
        operators.init_cpu_memory_env = lambda nodes: None
        with torch.random.fork_rng():
            yield
    finally:
        operators.init_cpu_memory_env = bind
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads


def segment_name(group: dist.ProcessGroup) -> str:
    """A name for the replica's shared memory, the same on all its ranks, that names its owner."""
    box = [f"{PREFIX}-{_pid_namespace()}-{os.getpid()}-{len(_users)}"]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def remove_stale_segments(directory: Path = SHM) -> list[str]:
    """Remove the shared memory that killed runs have left, and return its names.

    Only segments of this program whose process, of this PID namespace and user, has ended.
    """
    removed = []
    for file in directory.glob(f"*{PREFIX}-{_pid_namespace()}-*"):
        pid = file.name.partition(f"{PREFIX}-{_pid_namespace()}-")[2].partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and _is_mine(file):
            file.unlink(missing_ok=True)  # another rank may have been faster
            removed.append(file.name)
    return removed


def remove_segments(name: str, directory: Path = SHM) -> None:
    """Unlink an engine's segments; processes that have mapped them keep them."""
    for file in directory.glob(f"*{name}-*"):
        file.unlink(missing_ok=True)  # another rank may have been faster


def _is_mine(file: Path) -> bool:
    try:
        return file.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
