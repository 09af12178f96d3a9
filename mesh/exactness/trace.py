"""Traces of one sequence: the output of every module on either side, and where two diverge.

Forward passes are run again with hooks on the modules (`mesh/model/tracer.py`), and the rows of one
sequence are kept: a row of every position by the trainer, those of its prefill and decode steps by
the engine. For inspection only: a trace holds more than a dozen activations of every layer for
every token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mesh.engine.base import Engine, Row
from mesh.engine.conversation import Script, scripted
from mesh.model.tracer import LOGPROBS, ModuleTracer, Rows
from mesh.rl.packing import pack
from mesh.rl.step import Pass
from mesh.roles.trainer import Trainer
from mesh.types import Distribution, Request, Rollout, RolloutKey, Sampling


@dataclass(frozen=True)
class Trace:
    """The modules' outputs for one sequence, on the CPU, whole across tensor-parallel ranks.

    outputs: rows [R, width] by module, in execution order; positions: where in the sequence each of
    these rows belongs. A position that was computed more than once (a prompt whose shared KV was
    given up, a sequence that made room) has a row for each time. Empty on ranks that do not have
    the sequence.
    """

    outputs: dict[str, Tensor]
    positions: dict[str, list[int]]


@dataclass(frozen=True)
class ModuleDifference:
    """A module and position at which two traces differ: in `count` of `width` features, of which
    `feature` is the first, with its two values.
    """

    module: str
    position: int
    feature: int
    values: tuple[float, float]
    count: int
    width: int


def trace_generation(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    key: RolloutKey,
    script: Script | None = None,
) -> Trace:
    """Generate again and keep what belongs to one sample. All tp ranks of the engine call it.

    With the same weights, requests and sampling the engine forms the same batches and draws the
    same tokens. With a script they are conversations, whose replies come at once: batches are then
    others. Raises ValueError where the sample is not among the requests.
    """
    tracer = ModuleTracer(engine.model, engine.group)

    def observe(rows: list[Row]) -> None:
        tracer.expect([(i, p) for i, (prompt, s, p) in enumerate(rows) if _is(key, prompt, s)])

    prompts = [r for r in requests if r.prompt_id == key[0] and key[1] < r.num_samples]
    if not prompts:
        raise ValueError(f"no request asks for (prompt_id, sample_id)={key}")
    engine.reset(engine.version)  # pages that were cached before would have no rows
    engine.observer = observe
    try:
        with tracer.hooks():
            rollouts = scripted(engine, requests, sampling, script)
    finally:
        engine.observer = None
    mine = next(r for r in rollouts if r.key == key)
    # the engine scores without the module of this name
    before = len(mine.prompt_tokens) - 1
    places = [before + index for index in mine.loss_indices]
    tracer.keep(LOGPROBS, torch.tensor(mine.logprobs)[:, None], places)
    return Trace(tracer.outputs(), dict(tracer.positions))


def _is(key: RolloutKey, prompt_id: int, sample_id: int | None) -> bool:
    return prompt_id == key[0] and sample_id in (None, key[1])


@torch.no_grad()
def trace_training(
    trainer: Trainer, passes: Sequence[Pass], key: RolloutKey, at: Distribution | None = None
) -> Trace:
    """Run the forward passes of `accumulate` again, without gradients, and keep one rollout's rows.

    A collective of the trainer: every rank gives its own passes. The data-parallel rank that has
    the rollout gets its trace, on all its tp ranks.
    """
    if trainer.model is None:
        return Trace({}, {})
    group = trainer.mesh.get_group("tp") if trainer.mesh["tp"].size() > 1 else None
    tracer = ModuleTracer(trainer.model, group)
    with tracer.hooks():
        for leaves in passes:
            tracer.expect(*_rows_of([r for leaf in leaves for r in leaf.rollouts], key))
            trainer.forward(trainer.model, pack(leaves).to(trainer.device), at)
    return Trace(tracer.outputs(), dict(tracer.positions))


def _rows_of(rollouts: Sequence[Rollout], key: RolloutKey) -> tuple[Rows, Rows]:
    """One rollout's rows among packed ones: of all its tokens, and of its loss tokens' logprobs."""
    token = scored = 0
    for r in rollouts:
        if r.key == key:
            before = len(r.prompt_tokens) - 1
            return (
                [(token + i, i) for i in range(r.num_tokens)],
                [(scored + n, before + i) for n, i in enumerate(r.loss_indices)],
            )
        token, scored = token + r.num_tokens, scored + r.length
    return [], []


def first_difference(a: Trace, b: Trace) -> ModuleDifference | None:
    """The earliest position at which the two differ in any bit, and there the first module.

    Positions come first because later ones see earlier ones through keys and values. What only one
    of them has - the last token's row, which no engine computes - is not compared.
    """
    assert a.outputs.keys() == b.outputs.keys(), (
        f"traces of different modules: {sorted(a.outputs.keys() ^ b.outputs.keys())}"
    )
    found, compared = [], 0
    for name, mine in a.outputs.items():
        theirs = b.outputs[name]
        assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype} cannot equal {theirs.dtype}"
        pairs = _shared_rows(a.positions[name], b.positions[name])
        compared += len(pairs)
        x_RF, y_RF = (side[index] for side, index in zip((mine, theirs), pairs.T, strict=True))
        places = [a.positions[name][row] for row in pairs[:, 0].tolist()]
        found += _earliest(name, x_RF, y_RF, places)
    assert compared, "the traces have no row in common"
    return min(found, key=lambda difference: difference.position, default=None)


def _shared_rows(a: Sequence[int], b: Sequence[int]) -> Tensor:
    """int64 [pairs, 2]: all pairs of a row of each whose positions are the same."""
    rows = defaultdict(list)
    for row, position in enumerate(b):
        rows[position].append(row)
    pairs = [(i, j) for i, position in enumerate(a) for j in rows[position]]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _earliest(
    name: str, x_RF: Tensor, y_RF: Tensor, positions: Sequence[int]
) -> list[ModuleDifference]:
    """The difference at the earliest of these rows' positions; none, an empty list."""
    differs_RF = _bits(x_RF) != _bits(y_RF)
    rows = differs_RF.any(-1).nonzero()[:, 0].tolist()
    if not rows:
        return []
    row = min(rows, key=lambda r: positions[r])
    features = differs_RF[row].nonzero()[:, 0].tolist()
    values = float(x_RF[row, features[0]]), float(y_RF[row, features[0]])
    width = x_RF.shape[1]
    return [ModuleDifference(name, positions[row], features[0], values, len(features), width)]


def _bits(x: Tensor) -> Tensor:
    """The bits of floats as integers: NaN equals itself, and 0.0 is not -0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def first_not_finite(trace: Trace) -> tuple[str, int] | None:
    """(module, position) of the earliest position with an output that is not finite, and there the
    first module.
    """
    found = [
        (name, trace.positions[name][row])
        for name, x_RF in trace.outputs.items()
        for row in (~x_RF.isfinite().all(-1)).nonzero()[:, 0].tolist()
    ]
    return min(found, key=lambda place: place[1], default=None)
