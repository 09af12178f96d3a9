"""What each rank says of the tensors it holds, and whether the two roles' tensors fit each other.

Layouts are known to all ranks; dtypes, ties and storage are known to the rank that has them. So
each rank describes its own, the descriptions are gathered, and all ranks judge them alike: an error
that one rank would raise alone would leave the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mesh.layout.reshard import ParamLayout


@dataclass(frozen=True)
class Holding:
    """One rank's tensors of one role. `tied` maps a name to the earlier name of the same storage;
    `plain`: all are contiguous and on the bridge's device."""

    dtypes: dict[str, torch.dtype]
    tied: dict[str, str]
    plain: bool
    problems: list[str]


def local_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards: a DTensor's local tensor, any other tensor itself."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


def describe(
    role: str,
    tensors: Mapping[str, Tensor],
    layouts: Sequence[ParamLayout],
    rank: int,
    device: torch.device,
) -> Holding:
    """One rank's holding of a role; what does not fit the layouts becomes `problems`."""
    with torch.no_grad():
        local = local_tensors(tensors)
    where = f"on {role} rank {rank}"
    unknown = sorted(local.keys() - {layout.name for layout in layouts})
    problems = [f"{name} {where} has no layout" for name in unknown]
    for layout in layouts:
        problem = _misfit(local.get(layout.name), layout, rank)
        problems += [f"{layout.name} {where} {problem}"] if problem else []
    return Holding(
        dtypes={name: tensor.dtype for name, tensor in local.items()},
        tied=_tied(local),
        plain=all(t.is_contiguous() and t.device.type == device.type for t in local.values()),
        problems=problems,
    )


def _misfit(tensor: Tensor | None, layout: ParamLayout, rank: int) -> str | None:
    block = layout.blocks.get(rank)
    if tensor is None:
        return "is missing" if block else None
    if tensor.is_meta:
        return "is on the meta device, where a copy does nothing"
    fits = tuple(tensor.shape) == block.size if block else not tensor.numel()
    expected = block.size if block else "nothing"
    return None if fits else f"has shape {tuple(tensor.shape)}; the layout says {expected}"


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[object, str] = {}
    tied = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if first.setdefault(key, name) != name:
                tied[name] = first[key]
    return tied


def agree(
    trainer: Sequence[Holding], generator: Sequence[Holding], dtype: torch.dtype
) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype]]:
    """Both roles' dtypes by name, from all ranks' holdings (by global rank).

    Raises `ValueError` listing all ranks' problems, dtypes that differ between the ranks of a role,
    and generator tensors that are neither of `dtype` nor of the trainer's own.
    """
    problems = [line for holding in (*trainer, *generator) for line in holding.problems]
    source = _common_dtypes("trainer", trainer, problems)
    destination = _common_dtypes("generator", generator, problems)
    for name in sorted(source.keys() & destination.keys()):
        if destination[name] not in (dtype, source[name]):
            problems.append(
                f"{name} is {destination[name]} in the generator; generator.dtype is {dtype} "
                f"and the trainer's {source[name]}"
            )
    if problems:
        raise ValueError("weights do not fit their layouts: " + "; ".join(problems))
    return source, destination


def _common_dtypes(
    role: str, holdings: Sequence[Holding], problems: list[str]
) -> dict[str, torch.dtype]:
    dtypes: dict[str, torch.dtype] = {}
    for holding in holdings:
        for name, dtype in holding.dtypes.items():
            if dtypes.setdefault(name, dtype) != dtype:
                problems.append(f"{name} is {dtype} and {dtypes[name]} on different {role} ranks")
    return dtypes


def can_alias(
    source_layouts: Sequence[ParamLayout],
    destination_layouts: Sequence[ParamLayout],
    source_dtypes: Mapping[str, torch.dtype],
    destination_dtypes: Mapping[str, torch.dtype],
    plain: bool,
) -> bool:
    """Whether the generator may use the trainer's own storage: the same block of each parameter on
    the same ranks, the same dtypes, and `plain` (contiguous, on the device) tensors everywhere."""
    blocks = {layout.name: layout.blocks for layout in source_layouts}
    same_blocks = blocks == {layout.name: layout.blocks for layout in destination_layouts}
    return same_blocks and source_dtypes == destination_dtypes and plain
