"""L0 and L2: steps of the real loop, and the logprobs of both roles for every token in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mesh.engine.conversation import script_of
from mesh.exactness.comparison import (
    Mismatch,
    Rollouts,
    Tally,
    add,
    by_key,
    compare_rollouts,
    compare_values,
    of_all_ranks,
)
from mesh.exactness.generator import Variant
from mesh.exactness.generator import replayer as engine_replayer
from mesh.exactness.naming import NOTHING, Replay, settle
from mesh.exactness.table import Check
from mesh.exactness.trace import Trace, trace_generation, trace_training
from mesh.exactness.trainer import replayer as arrangement_replayer
from mesh.exactness.trainer import resharded, score, score_arranged, scored
from mesh.exactness.walk import Walk
from mesh.layout.holdings import local_tensors
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import Program, sync, weights_digest
from mesh.rl.step import Pass, ScoredWave, batch_of, share_of
from mesh.roles.trainer import Trainer
from mesh.tasks import Draw
from mesh.tasks.prompts import step_prompts
from mesh.types import Distribution, NumberedPrompt, Rollout, RolloutKey, Sampling

WARM = (0.7, 1.3)  # temperatures beside the configuration's own

TWICE = 2  # steps that L0 runs twice: the second one starts from weights that the first one made


def exact_metrics(updates: int) -> dict[str, float]:
    """Metrics of a step in which trainer and generator agree; the ratio is that of its first
    update, after which the policy has moved."""
    first = "update/1/" if updates > 1 else ""
    return {"logprob_diff/max": 0.0, f"{first}ratio/max": 1.0, f"{first}ratio/mean": 1.0}


@dataclass
class SeenStep:
    """One step as this rank saw it, filled in by `see`: rollouts that it generated, and the
    trainer's logprobs against the generator's, on all ranks.
    """

    seek: bool
    rollouts: dict[RolloutKey, Rollout] = field(default_factory=dict)
    logprobs: Tally = field(default_factory=Tally)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The digest of the new weights."""
        return self.metrics["digest/weights"]

    def see(self, program: Program, process: Process, wave: ScoredWave) -> None:
        """Compare a wave before the update. Collective."""
        mine = wave.share.rollouts
        found = compare_rollouts(scored(mine, wave.logprobs_A), by_key(mine), wave.step)
        sampling = program.generator.sampling(wave.step)
        sides = (
            passes_replayer(program.trainer, wave.share.passes, sampling.scored),
            generation_replayer(program, wave.prompts, sampling, wave.generated),
        )
        seek = self.seek and self.logprobs.first is None
        self.logprobs += settle(process, found, *sides, seek)
        self.rollouts |= by_key(wave.generated)


def take_step(walk: Walk, program: Program, step: int, seek: bool) -> SeenStep:
    """One step of the recipe, compared before its update."""
    seen = SeenStep(seek and walk.seek)
    phases = Phases(walk.process.device)
    seen.metrics = walk.take_step(program, walk.process, phases, step, seen.see).metrics
    return seen


def passes_replayer(trainer: Trainer, passes: Sequence[Pass], scored: Distribution) -> Replay:
    """Runs these forward passes again and traces one of their rollouts."""

    def trace(key: RolloutKey) -> Trace:
        with resharded(trainer):
            return trace_training(trainer, passes, key, scored)

    return trace


def generation_replayer(
    program: Program,
    prompts: Sequence[NumberedPrompt],
    sampling: Sampling,
    generated: Sequence[Rollout],
) -> Replay:
    """Generates the prompts' groups again and traces one of the samples; conversations have the
    replies that they had.
    """

    def trace(key: RolloutKey) -> Trace:
        generator, keys = program.generator, program.plan.step
        together = batch_of(prompts, key[0], keys.num_prompts)
        requests = generator.requests(together, keys.group_size)
        if generator.engine is None or key[0] not in {r.prompt_id for r in requests}:
            return NOTHING
        return trace_generation(generator.engine, requests, sampling, key, script_of(generated))

    return trace


def twice_checks(walk: Walk, program: Program) -> Iterator[Check]:
    """The rows of L0; afterwards the program has the weights again that it had before."""
    start = {
        name: tensor.detach().cpu().clone()
        for name, tensor in local_tensors(program.trainer.parameters()).items()
    }
    runs = []
    for _ in range(2):
        runs.append([take_step(walk, program, i, seek=False) for i in range(TWICE)])
        program.trainer.restart(start)
        program.pass_rates.restore({})
        sync(program)
    pairs = list(enumerate(zip(*runs, strict=True)))
    kinds = {
        f"tokens and logprobs of {TWICE} steps, twice": [
            compare_rollouts(b.rollouts, a.rollouts, step) for step, (a, b) in pairs
        ],
        "rewards": [compare_values(rewards(b), rewards(a), step) for step, (a, b) in pairs],
        "loss, gradient norm and other metrics": [
            compare_values(b.metrics, a.metrics, step) for step, (a, b) in pairs
        ],
        "digest of the weights": [
            compare_values({"digest": b.digest}, {"digest": a.digest}, step)
            for step, (a, b) in pairs
        ],
    }
    for what, tallies in kinds.items():
        yield Check("L0", what, of_all_ranks(walk.process, add(tallies)))


def rewards(step: SeenStep) -> dict[str, float | str]:
    return {f"reward of {key}": rollout.reward for key, rollout in step.rollouts.items()}


def mixed_check(walk: Walk, program: Program, mixed: Rollouts, sampling: Sampling) -> Check:
    """The row of L2 on the batch of mixed lengths, which every rank has as generated."""
    trainer, at = program.trainer, sampling.scored
    found = compare_rollouts(score_arranged(walk, trainer, mixed, at), mixed)
    one = arrangement_replayer(walk, trainer, mixed, at)
    whole = Variant(walk.requests, script=walk.script)
    other = engine_replayer(program.generator.engine, whole, sampling)
    tally = settle(walk.process, found, one, other, walk.seek)
    return Check("L2", "prompts of mixed lengths", tally)


def loop_checks(walk: Walk, program: Program, steps: int) -> Iterator[Check]:
    """The other rows of L2: steps of the loop, each with new weights, then greedy and warm."""
    before, total, exact = weights_digest(program), Tally(), Tally()
    expected = exact_metrics(program.plan.step.updates)
    for step in range(steps):
        seen = take_step(walk, program, step, seek=total.first is None)
        total += seen.logprobs
        metrics = {name: seen.metrics[name] for name in expected if name in seen.metrics}
        exact += compare_values(metrics, expected if metrics else {}, step)
        exact += _changed(before, seen.digest, step)
        before = seen.digest
    yield Check("L2", f"{steps} steps of the loop", total)
    yield Check(
        "L2", "ratio and logprob difference of these steps", of_all_ranks(walk.process, exact)
    )
    for name, temperature in (("greedy", 0.0), *((f"temperature {t}", t) for t in WARM)):
        tally = compare_rollouts_at(walk, program, steps, temperature)
        yield Check("L2", f"rollouts, {name}", tally)


def _changed(before: str, after: str, step: int) -> Tally:
    """A failure where a step left the weights as they were; else nothing, it compares no bits."""
    if before != after:
        return Tally()
    return Tally(0, 1, 0, Mismatch("weights", ("as before", "new ones"), step))


def compare_rollouts_at(walk: Walk, program: Program, step: int, temperature: float) -> Tally:
    """Trainer against generator on one more step's prompts at a temperature, without an update."""
    plan, trainer, generator = program.plan, program.trainer, program.generator
    prompts, _ = step_prompts(plan.prompts, walk.process, Draw(step, plan.step.num_prompts))
    sampling = generator.sampling(step, temperature)
    rollouts = generator.rollout(program.scorer, prompts, plan.step.group_size, sampling)
    wave = program.exchange([p.prompt_id for p in prompts], rollouts)
    # greedy samples of a prompt are equal, and so are their rewards
    whole = replace(plan.step, drop_equal_groups=False)
    share = share_of(wave, whole, trainer.dp, trainer.dp_rank, step)
    at = sampling.scored
    found = score(trainer, share.passes, at)
    program.exchange.flush()
    sides = (
        passes_replayer(trainer, share.passes, at),
        generation_replayer(program, prompts, sampling, rollouts),
    )
    tally = compare_rollouts(found, by_key(share.rollouts), step)
    return settle(walk.process, tally, *sides, walk.seek)
