"""The table of engines: one row for each, with the properties that are known before it is built.

A new engine is a folder in this room, a row here, and a choice in the schema: nothing outside the
room compares the names of engines. A row imports the packages of its engine when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mesh.config.keys import problem, value_of
from mesh.config.schema import Conf
from mesh.engine.base import Engine, EngineSettings
from mesh.engine.native.engine import NativeEngine
from mesh.engine.vllm.checks import own_model_problems, releases_cache, vllm_problems
from mesh.engine.vllm.environment import prepare
from mesh.model.attention import CPU_PAGE, CUDA_PAGE
from mesh.model.policy import Policy, build_policy
from mesh.types import ModelShape


@dataclass(frozen=True)
class Replica:
    """This rank's part of one data-parallel engine: the model's shape, the generator's mesh, device
    and dtype. Collectives end after `timeout_seconds`.
    """

    shape: ModelShape
    mesh: DeviceMesh
    device: torch.device
    dtype: torch.dtype
    timeout_seconds: int = 1800

    @property
    def group(self) -> dist.ProcessGroup:
        """The engine's tp ranks; a group also where there is one."""
        return self.mesh.get_group("tp")


@dataclass(frozen=True)
class Pages:
    """Tokens of a KV page: the default, and the `unit` of which `kernel` takes multiples."""

    default: int
    unit: int
    kernel: str


@dataclass(frozen=True, eq=False)  # rows are compared by identity
class EngineKind:
    """One engine's declaration. A `device` is "cpu" or "cuda".

    keys: the configuration that chooses it;
    runs_policy: it runs the trainer's own modules, which `build` is then given;
    exact: it can be batch-invariant, with the bits of the trainer;
    own_buffers: its buffers are its own, so that a sync transfers the weights alone;
    shares_storage: its weights may be the trainer's own tensors; "uncaptured": unless it captures
    CUDA graphs at start-up, which would replay the first weights for ever, unseen by any digest;
    pages: by device; verify: by device, the syncs whose digests are compared by default;
    releases: the trainer has the memory of its KV cache while it trains (conf, device);
    problems: everything that keeps it from starting (conf, shape or None if unknown, device);
    build: makes the engine on this rank, as a collective of its tp ranks. The policy is None
    unless `runs_policy`.
    """

    keys: Mapping[str, str]
    runs_policy: bool
    exact: bool
    own_buffers: bool
    shares_storage: Literal["always", "uncaptured", "never"]
    pages: Mapping[str, Pages]
    verify: Mapping[str, Literal["every", "first"]]
    releases: Callable[[Conf, str], bool]
    problems: Callable[[Conf, ModelShape | None, str], list[str]]
    build: Callable[[Policy | None, EngineSettings, Replica], Engine]

    def __str__(self) -> str:
        """The keys as a user types them."""
        return " ".join(f"{name}={value}" for name, value in self.keys.items())

    def may_alias(self, device: str, cuda_graphs: bool) -> bool:
        """True if its weights may be the trainer's own tensors."""
        captured = device == "cuda" and cuda_graphs
        return self.shares_storage == "always" or (
            self.shares_storage == "uncaptured" and not captured
        )


def build_native(model: Policy | None, settings: EngineSettings, replica: Replica) -> Engine:
    assert model is not None, "the native engine runs the trainer's policy"
    group = replica.group if replica.group.size() > 1 else None
    return NativeEngine(model, replica.shape, settings, group)


def build_vllm(model: Policy | None, settings: EngineSettings, replica: Replica) -> Engine:
    prepare()
    from mesh.engine.vllm.engine import VllmEngine  # slow to import, and optional

    return VllmEngine(
        model,
        replica.shape,
        settings,
        replica.group,
        replica.device,
        replica.dtype,
        replica.timeout_seconds,
    )


POLICY_PAGES = {
    "cpu": Pages(CPU_PAGE, 1, "the CPU attention"),
    "cuda": Pages(CUDA_PAGE, CUDA_PAGE, "the CUDA attention kernel"),
}
VLLM_PAGES = {"cpu": Pages(32, 32, "vLLM's attention"), "cuda": Pages(16, 16, "vLLM's attention")}

NATIVE = EngineKind(
    {"engine": "native"},
    runs_policy=True,
    exact=True,
    own_buffers=False,
    shares_storage="always",
    pages=POLICY_PAGES,
    verify={"cpu": "every", "cuda": "first"},
    releases=lambda conf, device: False,  # captured graphs hold the addresses of its cache
    problems=lambda conf, shape, device: [],
    build=build_native,
)
VLLM_TITAN = EngineKind(
    {"engine": "vllm", "vllm.model": "titan"},
    runs_policy=True,
    exact=True,
    own_buffers=False,
    shares_storage="uncaptured",
    pages=POLICY_PAGES,
    verify={"cpu": "every", "cuda": "every"},
    releases=releases_cache,
    problems=vllm_problems,
    build=build_vllm,
)
VLLM_NATIVE = replace(
    VLLM_TITAN,
    keys={"engine": "vllm", "vllm.model": "native"},
    runs_policy=False,
    exact=False,
    own_buffers=True,
    shares_storage="never",
    pages=VLLM_PAGES,
    problems=own_model_problems,
)

KINDS = (NATIVE, VLLM_TITAN, VLLM_NATIVE)
REFERENCE = NATIVE
"""The specification: every exact engine has its bits."""


def build_engine(kind: EngineKind, settings: EngineSettings, replica: Replica) -> Engine:
    """Build the engine of this rank, its weights not yet written. Collective of its tp ranks."""
    model = None
    if kind.runs_policy:
        model = build_policy(
            replica.shape, settings.max_length, replica.device, replica.dtype, replica.mesh
        )
    return kind.build(model, settings, replica)


def kind_of(conf: Conf) -> EngineKind:
    """The row that `conf` chooses."""
    chosen = [
        kind
        for kind in KINDS
        if all(value_of(conf, name) == value for name, value in kind.keys.items())
    ]
    assert len(chosen) == 1, f"engine={conf.engine} has no row, or several, in the table of engines"
    return chosen[0]


def reference_of(engine: Engine) -> Engine:
    """An engine of the reference kind with the same weights, settings and version."""
    reference = NativeEngine(engine.model, engine.shape, engine.settings, engine.group)
    reference.reset(engine.version)
    return reference


def engine_problems(conf: Conf, shape: ModelShape | None, device: str) -> list[str]:
    """Everything that keeps the chosen engine from starting. `shape` None: unknown."""
    kind = kind_of(conf)
    return [
        *exact_problems(conf, kind),
        *page_problems(conf, kind, device),
        *kind.problems(conf, shape, device),
    ]


def exact_problems(conf: Conf, kind: EngineKind) -> list[str]:
    """batch_invariant=true with an engine that cannot be exact."""
    if kind.exact or not conf.batch_invariant:
        return []
    name, value = list(kind.keys.items())[-1]
    wrong = "its kernels round differently from the trainer's, so it cannot be exact"
    others = ", ".join(str(other) for other in KINDS if other.exact)
    return [problem(name, value, wrong, f"use {others}, or batch_invariant=false")]


def page_problems(conf: Conf, kind: EngineKind, device: str) -> list[str]:
    """A page size that the engine's attention does not support."""
    size, pages = conf.generator.page_size, kind.pages[device]
    if size % pages.unit == 0:
        return []
    wrong = f"{pages.kernel} wants a multiple of {pages.unit}"
    remedy = f"use {-(-size // pages.unit) * pages.unit}, or 0 for the default"
    return [problem("generator.page_size", size, wrong, remedy)]
