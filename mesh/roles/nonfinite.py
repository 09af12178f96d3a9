"""The report on a step whose loss or gradient is not finite: sequences, gradients and weights.

Sums that a step needs anyway show that it has such a value. Only then does every trainer rank look
at the passes it kept and at its shards of the gradients and weights; the findings of all ranks are
merged here, each counted once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mesh.layout.reshard import Block, ParamLayout
from mesh.types import Rollout, RolloutKey

REPORT = "nonfinite.jsonl"
SHOWN = 10  # findings of a kind that a person is shown
WRITTEN = 1000  # findings of a kind that a line of the file holds


@dataclass(frozen=True)
class Trained:
    """One pass, kept until the update: the A loss tokens of its rollouts, in order, with the
    trainer's logprobs, the loss, and its gradient by these logprobs (None: it does not depend on
    them).
    """

    rollouts: tuple[Rollout, ...]
    logprobs_A: Tensor
    loss_A: Tensor
    gradient_A: Tensor | None


@dataclass(frozen=True, order=True)
class BadSequence:
    """A sequence with values that are not finite. `position`: of the first one, in the response;
    `what` and `value`: what it is and what it says (as text: NaN differs from itself); `tokens`:
    how many of its tokens have such a one, of `length`.
    """

    prompt_id: int
    sample_id: int
    position: int
    what: str
    value: str
    tokens: int
    length: int


@dataclass(frozen=True)
class Findings:
    """The findings of one rank: sequences, and elements that are not finite of its blocks of
    gradients and weights, (parameter, block, count).
    """

    sequences: list[BadSequence]
    gradients: list[tuple[str, Block, int]]
    weights: list[tuple[str, Block, int]]


@dataclass(frozen=True, order=True)
class BadParameter:
    """A parameter of which `elements` of `total` are not finite."""

    name: str
    elements: int
    total: int


@dataclass(frozen=True)
class Report:
    """The findings of all ranks in an update of a step, sorted. `loss` and `grad_norm` are texts;
    `weights`: those not finite before it; `parameters`: how many the model has; `update`: which of
    the step, from 1.
    """

    step: int
    action: str
    loss: str
    grad_norm: str
    sequences: list[BadSequence]
    gradients: list[BadParameter]
    weights: list[BadParameter]
    parameters: int
    update: int = 1


def bad_sequences(trained: Iterable[Trained]) -> list[BadSequence]:
    """The sequences of these microbatches with a logprob, a loss or a gradient that is not finite.

    A loss counts where both its logprobs are finite, and its gradient by the trainer's logprob
    where the loss is: else they only follow from what is listed already.
    """
    return [found for microbatch in trained for found in _of_microbatch(microbatch)]


def _of_microbatch(trained: Trained) -> Iterator[BadSequence]:
    mine_A, loss_A = trained.logprobs_A.float().cpu(), trained.loss_A.float().cpu()
    theirs_A = torch.tensor([x for r in trained.rollouts for x in r.logprobs], dtype=torch.float32)
    assert mine_A.shape == theirs_A.shape, f"{len(mine_A)} logprobs for {len(theirs_A)} tokens"
    places = [(r, i) for r in trained.rollouts for i in r.loss_indices]
    bad_A = ~mine_A.isfinite() | ~theirs_A.isfinite()
    yield from _where("generator logprob", theirs_A, ~theirs_A.isfinite(), places)
    yield from _where("trainer logprob", mine_A, ~mine_A.isfinite(), places)
    yield from _where("loss", loss_A, ~loss_A.isfinite() & ~bad_A, places)
    if trained.gradient_A is not None:
        gradient_A, bad_A = trained.gradient_A.float().cpu(), bad_A | ~loss_A.isfinite()
        which = "gradient by the trainer logprob"
        yield from _where(which, gradient_A, ~gradient_A.isfinite() & ~bad_A, places)


def _where(
    what: str, values_A: Tensor, bad_A: Tensor, places: Sequence[tuple[Rollout, int]]
) -> Iterator[BadSequence]:
    """A finding for every sequence that has a bad token; `places`: rollout and position of all."""
    by_sequence: dict[RolloutKey, list[int]] = {}
    for row in bad_A.nonzero()[:, 0].tolist():
        rollout, _ = places[row]
        by_sequence.setdefault(rollout.key, []).append(row)
    for key, rows in by_sequence.items():
        rollout, position = places[rows[0]]
        value = repr(float(values_A[rows[0]]))
        yield BadSequence(*key, position, what, value, len(rows), rollout.length)


def bad_blocks(
    tensors: Mapping[str, Tensor], blocks: Mapping[str, Block | None]
) -> list[tuple[str, Block, int]]:
    """(name, block, elements that are not finite) of this rank's local tensors that have any."""
    found = []
    for name, tensor in tensors.items():
        block, count = blocks[name], int((~tensor.detach().isfinite()).sum())
        if count:
            assert block is not None, f"{name}: elements without a place"
            found.append((name, block, count))
    return found


def findings(
    trained: Iterable[Trained],
    gradients: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    blocks: Mapping[str, Block | None],
) -> Findings:
    """One rank's findings: of the passes that it kept, and of its local gradients and weights."""
    return Findings(
        bad_sequences(trained), bad_blocks(gradients, blocks), bad_blocks(weights, blocks)
    )


def merged(
    step: int,
    action: str,
    metrics: Mapping[str, float],
    parts: Sequence[Findings],
    layouts: Sequence[ParamLayout],
    update: int = 1,
) -> Report:
    """All ranks' findings as one report: what replicas or tensor-parallel ranks both hold counts
    once. metrics: the step's `loss` and `grad_norm`; layouts: of every parameter.
    """
    totals = {layout.name: math.prod(layout.shape) for layout in layouts}
    return Report(
        step,
        action,
        repr(metrics["loss"]),
        repr(metrics["grad_norm"]),
        sorted({found for part in parts for found in part.sequences}),
        _parameters((x for part in parts for x in part.gradients), totals),
        _parameters((x for part in parts for x in part.weights), totals),
        len(totals),
        update,
    )


def _parameters(
    blocks: Iterable[tuple[str, Block, int]], totals: Mapping[str, int]
) -> list[BadParameter]:
    """Elements of each parameter over its blocks; of copies of a block the worst one counts."""
    worst: dict[tuple[str, Block], int] = {}
    for name, block, count in blocks:
        worst[name, block] = max(count, worst.get((name, block), 0))
    elements: dict[str, int] = {}
    for (name, _), count in worst.items():
        elements[name] = elements.get(name, 0) + count
    return sorted(BadParameter(name, count, totals[name]) for name, count in elements.items())


def message(report: Report) -> str:
    """The report for a person."""
    sequences = {(found.prompt_id, found.sample_id) for found in report.sequences}
    weights = "the weights before the step"
    return "\n".join([
        f"on_nonfinite={report.action}: {_numbers(report)}",
        *_listed(f"sequences: {len(sequences)}", map(_sequence, report.sequences)),
        *_listed(_count("gradients", report.gradients, report), map(_parameter, report.gradients)),
        *_listed(_count(weights, report.weights, report), map(_parameter, report.weights)),
        "  neither weights nor moments were changed; with on_nonfinite=skip, also after "
        "resume=RUN_DIR, a run continues without the update of such a step",
    ])  # fmt: skip


def head(report: Report) -> str:
    """The first findings of a skipped step, in one line."""
    firsts = []
    for found in (list(map(_sequence, report.sequences)), list(map(_parameter, report.gradients))):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        firsts += [found[0] + more] if found else []
    return f"skipped: {_numbers(report)}: {'; '.join(firsts) or 'no element'}; see {REPORT}"


def _numbers(report: Report) -> str:
    numbers = f"loss {report.loss}, gradient norm {report.grad_norm}"
    which = f", update {report.update}" if report.update > 1 else ""
    return f"step {report.step}{which} is not finite ({numbers})"


def _count(what: str, found: Sequence[BadParameter], report: Report) -> str:
    return f"{what}: {len(found)} of {report.parameters} parameters"


def _listed(title: str, lines: Iterable[str]) -> list[str]:
    found = list(lines)
    more = [f"... {len(found) - SHOWN} more lines"] if len(found) > SHOWN else []
    return [f"  {title}", *(f"    {line}" for line in [*found[:SHOWN], *more])]


def _sequence(found: BadSequence) -> str:
    return (
        f"prompt_id={found.prompt_id} sample_id={found.sample_id} position {found.position} of the "
        f"response: {found.what} {found.value} ({found.tokens} of {found.length} tokens)"
    )


def _parameter(found: BadParameter) -> str:
    return f"{found.name}: {found.elements} of {found.total} elements"


def to_json(report: Report) -> str:
    """One line of JSON: of each kind the count, and the first `WRITTEN`."""
    line: dict[str, Any] = asdict(report)
    for kind in ("sequences", "gradients", "weights"):
        line[kind] = {"count": len(line[kind]), "first": line[kind][:WRITTEN]}
    return json.dumps(line, allow_nan=False) + "\n"


def gathered(mine: Findings, group: dist.ProcessGroup) -> list[Findings]:
    """The findings of every rank of the trainer, by rank, on all of them. Collective of `group`."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return parts


def announce(report: Report, run_dir: str | None, group: dist.ProcessGroup) -> None:
    """Have the first of the trainer's ranks write a line of RUN_DIR/nonfinite.jsonl, and print one
    of a step that is skipped; RuntimeError on all of them for any other. Collective of `group`.
    """
    if dist.get_rank(group) == 0:
        if run_dir is not None:
            with open(Path(run_dir, REPORT), "a") as file:
                file.write(to_json(report))
        if report.action == "skip":
            print(head(report), flush=True)
    dist.barrier(group)  # no rank ends the run before the report is written
    if report.action == "stop":
        raise RuntimeError(message(report))
