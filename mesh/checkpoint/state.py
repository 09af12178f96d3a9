"""The trainer's state in checkpoints: weights, moments and averages, which share the layouts of the
weights, and the state of a user's optimizer: tensors with layouts of their own, plain values.

What is called own is nothing where trainer.optimizer is unset, and off the trainer's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mesh.checkpoint.files import Index, read_blocks
from mesh.config.keys import Refusal, problem
from mesh.layout.holdings import local_tensors
from mesh.layout.reshard import Block, ParamLayout
from mesh.lifecycle.process import Process
from mesh.roles.optimizer import Optimizer
from mesh.roles.own_optimizer import KEY
from mesh.roles.own_state import OWN
from mesh.roles.trainer import Trainer
from mesh.weights.bridge import gather_digests, weights_digest
from mesh.weights.digest import local_digests, replica_mismatches, total_digest

T = TypeVar("T")
Call = Callable[[Optimizer, Mapping[str, ParamLayout], list[int]], T]


def name_of(trainer: Trainer) -> str | None:
    """The value of trainer.optimizer; None: AdamW, or nothing is trained."""
    settings = trainer.settings.optimizer
    return None if settings is None else settings.name


def _on_trainer(trainer: Trainer, call: Call[T], otherwise: T) -> T:
    """The result of `call` with the optimizer, the layouts of the weights and the ranks."""
    if name_of(trainer) is None or trainer.model is None:
        return otherwise
    by_name = {layout.name: layout for layout in trainer.layouts}
    return call(trainer.optimizer, by_name, [int(rank) for rank in trainer.mesh.mesh.flatten()])


def own_layouts(trainer: Trainer) -> list[ParamLayout]:
    """Layouts of the state's tensors; none before the first update."""
    return _on_trainer(trainer, Optimizer.own_layouts, [])


def own_numbers(trainer: Trainer) -> dict[str, Any]:
    """Plain values of the state."""
    return _on_trainer(trainer, lambda optimizer, *_: optimizer.numbers(), {})


def refuse_own(process: Process, trainer: Trainer) -> None:
    """Raise Refusal on all ranks where a user's optimizer cannot train on this mesh, or its state
    cannot be saved. Collective."""
    name = name_of(trainer)
    if name is None:
        return
    mine: list[str] = _on_trainer(trainer, Optimizer.own_problems, [])
    found: list[str] = next(filter(None, process.gather(mine)), [])
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        remedy = "use one whose state is like the weights, or scalars"
        raise Refusal(problem(KEY, name, "; ".join(found[:3]) + more, remedy))


def make_own_state(process: Process, trainer: Trainer, path: Path, index: Index) -> None:
    """Have a state into which that of a checkpoint can be read. Refusal where the optimizer has
    another. Collective."""
    name = name_of(trainer)
    if name is None:
        return
    if trainer.model is not None:
        trainer.optimizer.make_state(index.updates, index.optimizer)
    mine = {(layout.name, layout.shape) for layout in own_layouts(trainer)}
    stored = {(key, shape) for key, shape in index.shapes.items() if "/" in key}
    other = sorted(key for key, _ in mine ^ stored) if trainer.model is not None else []
    other = next(filter(None, process.gather(other)), [])
    if other:
        wrong = f"its state {other[0]} is not that of {path}"
        remedy = "restore the optimizer that wrote it, or start a new run"
        raise Refusal(problem(KEY, name, wrong, remedy))


def restore_state(
    process: Process, trainer: Trainer, path: Path, index: Index, layouts: Sequence[ParamLayout]
) -> None:
    """Fill the trainer's state from a checkpoint; layouts: of the weights. Collective."""
    make_own_state(process, trainer, path, index)
    with torch.no_grad():
        state = {kind: local_tensors(part) for kind, part in trainer.state().items()}
    own = {OWN: state.pop(OWN, {})}
    read_blocks(path, index, state, layouts, process.rank)
    if own[OWN]:
        read_blocks(path, index, own, own_layouts(trainer), process.rank)


@torch.no_grad()
def host_copies(trainer: Trainer, names: Collection[str]) -> dict[str, Tensor]:
    """This rank's tensors of these names in host memory, by `KIND/NAME`."""
    return {
        f"{kind}/{name}": local.to("cpu", copy=True).contiguous()
        for kind, whole in trainer.state().items()
        for name, local in local_tensors(whole).items()
        if name in names
    }


def state_digests(
    process: Process,
    trainer: Trainer,
    layouts: Sequence[ParamLayout],
    digested: Sequence[ParamLayout],
) -> dict[str, str]:
    """Mesh-independent digests of each kind of state; that of the weights, by the layouts
    `digested`, counts a tied weight under both names. Collective."""
    state, group = trainer.state(), process.cpu_group
    found = {"weights": weights_digest(trainer.parameters(), digested, group)}
    for kind in sorted(state.keys() - {"weights", OWN}):
        found[kind] = weights_digest(state[kind], layouts, group)
    return found | ({OWN: own_digest(process, trainer, state[OWN])} if OWN in state else {})


def own_digest(process: Process, trainer: Trainer, tensors: Mapping[str, Tensor]) -> str:
    """Mesh-independent digest of the state's tensors. RuntimeError where ranks that should have the
    same state differ: it could not be resumed. Collective."""
    mine = own_layouts(trainer), own_numbers(trainer)
    told = [(layouts, numbers) for layouts, numbers in process.gather(mine) if numbers]
    if not told:
        return total_digest([], [])
    layouts, numbers = told[0]
    local = local_digests(local_tensors(tensors), layouts if mine[1] else [], process.rank)
    local |= {layout.name: 0 for layout in layouts if layout.name not in local}
    digests = gather_digests(local, layouts, process.cpu_group)
    wrong = [] if all(other == numbers for _, other in told) else ["its plain values"]
    for layout in layouts:
        by_rank = {rank: digests[rank][layout.name] for rank in layout.blocks}
        wrong += replica_mismatches("trainer", layout.name, layout.holders(), by_rank)
    if wrong:
        raise RuntimeError(
            f"{KEY}={name_of(trainer)}: its state differs between ranks that should have the same, "
            f"so that no checkpoint can hold it: {'; '.join(wrong[:3])}"
        )
    return total_digest(layouts, digests)


def with_own(index: Index, trainer: Trainer) -> Index:
    """The index of a step with the shapes and the plain values of the state."""
    shapes = {layout.name: layout.shape for layout in own_layouts(trainer)}
    return replace(index, shapes={**index.shapes, **shapes}, optimizer=own_numbers(trainer))


def own_blocks(trainer: Trainer, rank: int) -> dict[str, Block]:
    """The blocks that this rank writes: those of which it is the first holder."""
    held = (layout for layout in own_layouts(trainer) if rank in layout.blocks)
    return {
        layout.name: layout.blocks[rank]
        for layout in held
        if layout.holders()[layout.blocks[rank]][0] == rank
    }
