"""check=strict: a run ends at the first token whose trainer and generator logprobs differ.

Every wave is compared before the optimizer's step, while both sides still have the weights that
drew it. Where a bit differs, the sequence is run again on both sides with hooks on every module
(`trace.py`), and all ranks raise the same error, which names the first divergent module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mesh.engine.conversation import script_of
from mesh.exactness.comparison import Mismatch, Tally, add, by_key, compare_rollouts
from mesh.exactness.trace import Trace, trace_generation, trace_training
from mesh.exactness.trainer import scored
from mesh.exactness.verdict import Verdict, judge
from mesh.exchange.rollouts import replica_of
from mesh.layout.meshes import Layout
from mesh.lifecycle.process import Process
from mesh.program.assembly import Program
from mesh.rl.cutting import owner
from mesh.rl.step import ScoredWave, batch_of

REPORT = "strict.json"


def stop_at_difference(program: Program, process: Process, wave: ScoredWave) -> None:
    """Raise RuntimeError, on every rank alike, where a logprob of this wave differs in any bit
    between the sides or is not finite, after replaying its sequence. A collective of the world.
    """
    rollouts = wave.share.rollouts
    mine = compare_rollouts(scored(rollouts, wave.logprobs_A), by_key(rollouts))
    tally = merge(process.gather((mine, wave.share.tokens)), program.meshes.layout)
    if tally.first is None:
        return
    verdict = replay(program, process, wave, tally.first)
    facts = report(wave.step + 1, tally, verdict)
    if process.guard.run_dir is not None:
        process.write(Path(process.guard.run_dir, REPORT), to_json(facts))
    process.from_rank0(None)  # no rank ends the run before the report is written
    raise RuntimeError(message(wave.step + 1, tally, verdict))


def merge(parts: Sequence[tuple[Tally, int]], layout: Layout) -> Tally:
    """The tallies of all ranks: tensor-parallel ranks count once, and any rank's mismatch counts.

    parts: by rank, with the tokens of the whole wave as the trainer's ranks know them. Every one of
    them must have been compared.
    """
    counted = add([parts[rank][0] for rank in layout.trainer_ranks[:: layout.trainer.tp]])
    due = max(tokens for _, tokens in parts)
    assert counted.compared == due, f"{counted.compared} tokens were compared, {due} were due"
    found = [part.first for part, _ in parts if part.first is not None]
    first = min(found, key=lambda mismatch: (mismatch.key, mismatch.index), default=None)
    return Tally(counted.compared, counted.different, counted.not_finite, first)


def replay(program: Program, process: Process, wave: ScoredWave, first: Mismatch) -> Verdict:
    """Run the mismatch's sequence again on both sides, in its batches, and compare all modules.

    On the replica that generated it, and on the whole trainer. A collective of the world.
    """
    assert first.key is not None, "a token belongs to a sequence"
    trainer, generator, layout = program.trainer, program.generator, program.meshes.layout
    prompt_id, _ = first.key
    replica, generated = replica_of(prompt_id, generator.replicas), Trace({}, {})
    if generator.engine is not None and generator.replica == replica:
        keys = program.plan.step
        together = batch_of(wave.prompts, prompt_id, keys.num_prompts)
        requests = generator.requests(together, keys.group_size)
        sampling, script = generator.sampling(wave.step), script_of(wave.generated)
        generated = trace_generation(generator.engine, requests, sampling, first.key, script)
    trained = trace_training(trainer, wave.share.passes, first.key)
    source = layout.generator_ranks[replica * layout.generator.tp]
    target = layout.trainer_ranks[owner(prompt_id, layout.trainer.dp) * layout.trainer.tp]
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


def report(step: int, tally: Tally, verdict: Verdict) -> dict[str, Any]:
    """The content of `strict.json`."""
    first = tally.first
    assert first is not None and first.logprobs is not None
    token = {
        name: getattr(first, name)
        for name in ("prompt_id", "sample_id", "index", "position", "token")
    }
    token |= dict(zip(("trainer", "generator"), first.logprobs, strict=True))
    return {
        "step": step,
        "tokens": tally.compared,
        "differing": tally.different,
        "first": token,
        "replay": asdict(verdict),
    }


def message(step: int, tally: Tally, verdict: Verdict) -> str:
    """The facts for a person."""
    first = tally.first
    assert first is not None and first.logprobs is not None
    trainer, generator = first.logprobs
    assert trainer is not None and generator is not None, "both sides score every token"
    return "\n".join([
        f"check=strict: step {step}: trainer and generator logprobs differ",
        f"  sequence: prompt_id={first.prompt_id} sample_id={first.sample_id}",
        f"  token: {first.token}, at position {first.index} of the response and {first.position} "
        "of the sequence",
        f"  trainer logprob: {trainer!r} ({trainer.hex()})",
        f"  generator logprob: {generator!r} ({generator.hex()})",
        f"  differing: {tally.different} of {tally.compared} tokens of this wave",
        f"  {verdict.text}",
    ])  # fmt: skip


def to_json(facts: dict[str, Any]) -> str:
    """JSON with floats as repr and hex: JSON has no inf or nan."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return {"value": repr(value), "hex": value.hex()} if isinstance(value, float) else value

    return json.dumps(plain(facts), indent=2) + "\n"
