"""Descriptions of the tensors that each rank holds, and the check that both roles' match.

Layouts are known to all ranks; dtypes, ties and storage only to the rank that holds them. So each
rank describes its own, the descriptions are gathered, and all ranks check all of them: an error
raised on one rank alone would leave the others waiting in a collective.
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
    """One rank's tensors of one role. `tied` maps a name to the first name with the same storage;
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
    """Describe one rank's tensors of a role; mismatches with the layouts become `problems`."""
    with torch.no_grad():
        local = local_tensors(tensors)
    where = f"on {role} rank {rank}"
    unknown = sorted(local.keys() - {layout.name for layout in layouts})
    problems = [f"{name} {where} has no layout" for name in unknown]
    for layout in layouts:
        problem = _mismatch(local.get(layout.name), layout, rank)
        problems += [f"{layout.name} {where} {problem}"] if problem else []
    return Holding(
        dtypes={name: tensor.dtype for name, tensor in local.items()},
        tied=_tied(local),
        plain=all(t.is_contiguous() and t.device.type == device.type for t in local.values()),
        problems=problems,
    )


def _mismatch(tensor: Tensor | None, layout: ParamLayout, rank: int) -> str | None:
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


def resolve_dtypes(
    trainer: Sequence[Holding], generator: Sequence[Holding], dtype: torch.dtype
) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype]]:
    """Both roles' dtypes by name, from all ranks' holdings (by global rank).

    Raises `ValueError` listing all ranks' problems, dtypes that differ between the ranks of a role,
    and generator tensors that have neither `dtype` nor the trainer's own.
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
        raise ValueError("weights do not match their layouts: " + "; ".join(problems))
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
    """True if the generator can use the trainer's own storage: the same block of each parameter on
    the same ranks, the same dtypes, and `plain` (contiguous, on the device) tensors everywhere."""
    blocks = {layout.name: layout.blocks for layout in source_layouts}
    same_blocks = blocks == {layout.name: layout.blocks for layout in destination_layouts}
    return same_blocks and source_dtypes == destination_dtypes and plain
