"""vLLM's engine core inside this process, with its groups on one replica's ranks alone.

vLLM builds its groups over the default process group and, at its end, destroys that too. So the
replica's group is the default one while vLLM starts, and we end what it made ourselves. Besides, it
is kept from changing the process: random states, torch.set_num_threads, and the NUMA node to which
all memory of the process would be bound.
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
"""Engines of this process: vLLM's groups are shared by all of them."""


@register_model_loader(LOAD_FORMAT)
class NoWeights(BaseModelLoader):
    """Builds the model and reads nothing: the weight bridge writes every weight."""

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
    """vLLM's external launcher, told this rank's place in the replica instead of in the world."""

    place: tuple[str, int, int] = ("", 0, 0)

    def _distributed_args(self) -> tuple[str, int, int]:
        return self.place


def start_core(
    entries: Mapping[str, Any], options: Mapping[str, Any], group: dist.ProcessGroup, device: int
) -> EngineCore:
    """An engine core of a model that `entries` (a config.json) describes. Collective of `group`.

    options: of EngineArgs; group: the replica's tp ranks; device: this rank's, on its host.
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
        place = (f"mesh:{name}", group.rank(), device)
        executor = type("InReplica", (InReplica,), {"place": place})
        core = EngineCore(arguments.create_engine_config(), executor, log_stats=False)
    remove_segments(name)  # all ranks have mapped them: now nothing stays behind, however we end
    _users.append(core)
    return core


def stop_core(core: EngineCore) -> None:
    """What EngineCore.shutdown does, except for the program's process groups."""
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
    """Let `group` be the default process group for a block.

    Groups that are made in it have names of their own: torch counts groups to name them, and the
    ranks that are not here do not count along.
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
    """Random states and threads are afterwards what they were, and no memory is bound."""
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
    """A name for the replica's shared memory that says whose it is, the same on all its ranks."""
    box = [f"{PREFIX}-{_pid_namespace()}-{os.getpid()}-{len(_users)}"]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def remove_stale_segments(directory: Path = SHM) -> list[str]:
    """Remove what a killed run has left in shared memory, and return its names.

    Only segments of ours, of processes of this PID namespace and user that are no more.
    """
    removed = []
    for file in directory.glob(f"*{PREFIX}-{_pid_namespace()}-*"):
        pid = file.name.partition(f"{PREFIX}-{_pid_namespace()}-")[2].partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and _is_mine(file):
            file.unlink(missing_ok=True)  # another rank may have been faster
            removed.append(file.name)
    return removed


def remove_segments(name: str, directory: Path = SHM) -> None:
    """Take away the names of an engine's segments; whoever has mapped them keeps them."""
    for file in directory.glob(f"*{name}-*"):
        file.unlink(missing_ok=True)  # another rank may have been faster


def _is_mine(file: Path) -> bool:
    try:
        return file.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
