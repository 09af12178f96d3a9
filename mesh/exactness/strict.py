"""check=strict: a run ends at the first token whose trainer and generator logprobs differ.

Every wave is compared before the optimizer's step, while both sides still have the weights that
drew it. Where a bit differs, the sequence is run again on both sides with hooks on every module
(`mesh/exactness/trace.py`), and all ranks raise the same error, which says where the two part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mesh.exactness.trace import (
    Difference,
    Trace,
    first_difference,
    first_not_finite,
    trace_generation,
    trace_training,
)
from mesh.exchange.rollouts import replica_of
from mesh.layout.meshes import Layout
from mesh.lifecycle.process import Process
from mesh.model.tracer import LOGPROBS
from mesh.program.assembly import Program
from mesh.rl.packing import owner
from mesh.rl.step import Share
from mesh.types import Prompt, Rollout

REPORT = "strict.json"


@dataclass(frozen=True)
class Scored:
    """A wave that was trained on: its step, all its prompts, this rank's share, and the trainer's
    logprobs of that share's response tokens, in order.
    """

    step: int
    prompts: Sequence[Prompt]
    share: Share
    logprobs_A: Tensor


@dataclass(frozen=True, order=True)
class Token:
    """A token that the two sides score differently: `index` counts in the response, `position` in
    the whole sequence. trainer, generator: its logprobs.
    """

    prompt_id: int
    sample_id: int
    index: int
    position: int
    token: int
    trainer: float
    generator: float


@dataclass(frozen=True)
class Compared:
    """A comparison: tokens compared, how many of them differ, and the first that does."""

    tokens: int
    differing: int
    first: Token | None


@dataclass(frozen=True)
class Verdict:
    """What the replay of a sequence says. `module` and `position`, where it names any."""

    text: str
    module: str | None = None
    position: int | None = None
    difference: Difference | None = None


def stop_at_difference(program: Program, process: Process, wave: Scored) -> None:
    """Raises RuntimeError, on every rank alike, where a logprob of this wave differs in any bit
    between the sides or is not finite; first it is looked into. A collective of the world.
    """
    layout = program.meshes.layout
    rollouts = [r for leaf in wave.share.leaves for r in leaf.rollouts]
    parts = process.gather((compare(rollouts, wave.logprobs_A), wave.share.tokens))
    compared = merge(parts, layout)
    if compared.first is None:
        return
    verdict = replay(program, process, wave, compared.first)
    facts = {"step": wave.step + 1, **asdict(compared), "replay": asdict(verdict)}
    if process.guard.run_dir is not None:
        process.write(Path(process.guard.run_dir, REPORT), to_json(facts))
    process.from_rank0(None)  # no rank ends the run before the report is written
    raise RuntimeError(message(wave.step + 1, compared, verdict))


def compare(rollouts: Sequence[Rollout], logprobs_A: Tensor) -> Compared:
    """The rollouts' own logprobs and the trainer's, of the same response tokens in the same order.

    A logprob that is not finite counts as one that differs, whatever the other side has.
    """
    mine = logprobs_A.float().cpu()
    theirs = torch.tensor([x for r in rollouts for x in r.logprobs], dtype=torch.float32)
    assert mine.shape == theirs.shape, f"{len(mine)} logprobs for {len(theirs)} tokens"
    differs = mine.view(torch.int32) != theirs.view(torch.int32)
    rows = (differs | ~mine.isfinite()).nonzero()[:, 0].tolist()
    places = [(r, index) for r in rollouts for index in range(len(r.tokens))] if rows else []
    tokens = [
        Token(r.prompt_id, r.sample_id, i, len(r.prompt_tokens) + i, r.tokens[i],
              float(mine[row]), float(theirs[row]))
        for row in rows for r, i in [places[row]]
    ]  # fmt: skip
    return Compared(len(mine), len(rows), min(tokens, default=None))


def merge(parts: Sequence[tuple[Compared, int]], layout: Layout) -> Compared:
    """What all ranks compared: tensor-parallel ranks count once, each is heard.

    parts: by rank, with the tokens of the whole wave as the trainer's ranks know them. All of them
    must have been compared: a wave that was not looked at is no exact one.
    """
    counted = [parts[rank][0] for rank in layout.trainer_ranks[:: layout.trainer.tp]]
    num_tokens, due = sum(part.tokens for part in counted), max(tokens for _, tokens in parts)
    assert num_tokens == due, f"{num_tokens} tokens were compared, {due} were due"
    first = min((part.first for part, _ in parts if part.first is not None), default=None)
    return Compared(num_tokens, sum(part.differing for part in counted), first)


def replay(program: Program, process: Process, wave: Scored, token: Token) -> Verdict:
    """Run the token's sequence again on both sides, in its batches, and compare all modules.

    On the replica that generated it, and on the whole trainer. A collective of the world.
    """
    trainer, generator, layout = program.trainer, program.generator, program.meshes.layout
    key = token.prompt_id, token.sample_id
    replica, generated = replica_of(token.prompt_id, generator.replicas), Trace({}, {})
    if generator.engine is not None and generator.replica == replica:
        requests = generator.requests(wave.prompts, trainer.conf.group_size)
        sampling = generator.sampling(wave.step)
        generated = trace_generation(generator.engine, requests, sampling, key)
    trained = trace_training(trainer, wave.share.leaves, wave.share.token_counts, key)
    source = layout.generator_ranks[replica * layout.generator.tp]
    target = layout.trainer_ranks[owner(token.prompt_id, layout.trainer.dp) * layout.trainer.tp]
    generated = bring(generated, source, target, process.cpu_group)
    mine = judge(trained, generated) if process.rank == target else None
    verdict = process.gather(mine)[target]
    assert verdict is not None
    return verdict


def bring(trace: Trace, source: int, target: int, group: dist.ProcessGroup) -> Trace:
    """Rank `source`'s trace on rank `target`, sent module by module; other ranks keep theirs."""
    rank = dist.get_rank()
    if source == target or rank not in (source, target):
        return trace
    if rank == source:
        dist.send_object_list([list(trace.outputs)], target, group=group)
        for name, rows in trace.outputs.items():
            dist.send_object_list([rows, trace.positions[name]], target, group=group)
        return trace
    received, names = Trace({}, {}), [None]
    dist.recv_object_list(names, source, group=group)
    for name in names[0] or []:
        pair: list[Any] = [None, None]
        dist.recv_object_list(pair, source, group=group)
        received.outputs[name], received.positions[name] = pair
    return received


def judge(trained: Trace, generated: Trace) -> Verdict:
    """Where the two traces of a sequence part, in words."""
    found = first_difference(trained, generated)
    if found is None:
        broken = first_not_finite(trained)
        if broken is not None:
            text = "the replay agrees on both sides: the first output that is not finite is that of"
            return Verdict(f"{text} {broken[0]} at position {broken[1]} of the sequence", *broken)
        return Verdict(
            "the replay agrees on both sides: the difference does not reproduce, so some kernel is "
            "not deterministic, or not the same in forward passes alone (the replay computes no "
            "gradients and uses no CUDA graphs)"
        )
    features = (
        f"feature {found.feature} of {found.width} is {found.values[0]!r} on the trainer and "
        f"{found.values[1]!r} on the generator, {found.count} differ"
    )
    where = f"{found.module} at position {found.position} of the sequence"
    text = f"first differing module: {where} ({features})"
    if found.module == LOGPROBS:
        text = f"the hidden states are equal up to the logprob function: {where} ({features})"
    return Verdict(text, found.module, found.position, found)


def message(step: int, compared: Compared, verdict: Verdict) -> str:
    """The facts for a person."""
    token = compared.first
    assert token is not None
    return "\n".join([
        f"check=strict: step {step}: trainer and generator logprobs differ",
        f"  sequence: prompt_id={token.prompt_id} sample_id={token.sample_id}",
        f"  token: {token.token}, at position {token.index} of the response and {token.position} "
        "of the sequence",
        f"  trainer logprob: {token.trainer!r} ({token.trainer.hex()})",
        f"  generator logprob: {token.generator!r} ({token.generator.hex()})",
        f"  differing: {compared.differing} of {compared.tokens} tokens of this wave",
        f"  {verdict.text}",
    ])  # fmt: skip


def to_json(facts: dict[str, Any]) -> str:
    """JSON with floats as their shortest texts, which say inf and nan as well, and exact bits."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return {"value": repr(value), "hex": value.hex()} if isinstance(value, float) else value

    return json.dumps(plain(facts), indent=2) + "\n"
