"""L0 and L2: steps of the real loop, and what both roles say of every token in them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from mesh.config.schema import Conf
from mesh.exactness.batch import Walk
from mesh.exactness.bits import (
    Key,
    Place,
    Rollouts,
    Tally,
    add,
    compare_rollouts,
    compare_values,
    of_all_ranks,
)
from mesh.exactness.generator import Way
from mesh.exactness.generator import tracer as engine_tracer
from mesh.exactness.naming import NOTHING, Tracer, settle
from mesh.exactness.table import Check
from mesh.exactness.trace import Trace, trace_generation, trace_training
from mesh.exactness.trainer import score, score_arranged, scored, scoring
from mesh.exactness.trainer import tracer as arrangement_tracer
from mesh.layout.holdings import local_tensors
from mesh.program.assembly import Program, rules_of, step_normaliser, sync, weights_digest
from mesh.rl.losses import policy_loss_T
from mesh.rl.packing import PackedBatch
from mesh.rl.step import Share, share_of, waves_of
from mesh.roles.trainer import Trainer
from mesh.tasks import drawn
from mesh.types import Prompt, Rollout, Sampling

EXACT = {"logprob_diff/max": 0.0, "ratio/max": 1.0, "ratio/mean": 1.0}
"""Metrics of a step in which trainer and generator agree."""

WARM = (0.7, 1.3)  # temperatures beside the configuration's own

TWICE = 2  # steps that L0 runs twice: the second one starts from weights that the first one made


@dataclass(frozen=True)
class Step:
    """What this rank saw of a step: rollouts that it generated, `logprobs`: the trainer's against
    the generator's, on all ranks; metrics and the digest of the new weights.
    """

    rollouts: dict[Key, Rollout]
    logprobs: Tally
    metrics: dict[str, float]
    digest: str


def train_step(walk: Walk, program: Program, step: int, seek: bool) -> Step:
    """One step of `recipes/grpo.py`, with uneven rewards, comparing before the update."""
    conf, trainer, generator = walk.conf, program.trainer, program.generator
    task = walk.parts.task
    rules = replace(rules_of(conf), drop_equal_groups=False)
    prompts = drawn(task.train_prompts(step, conf.num_prompts), conf.num_prompts, "train_prompts")
    sampling = generator.sampling(step)
    made: list[Rollout] = []
    total, tokens, sequences = Tally(), 0, 0
    for part in waves_of(prompts, conf.waves):
        rollouts = uneven(generator.rollout(task, part, conf.group_size, sampling))
        wave = program.exchange([p.prompt_id for p in part], rollouts)
        share = share_of(wave, rules, trainer.dp)
        logprobs_A = trainer.accumulate(
            share.leaves, share.token_counts, partial(policy_objective, conf)
        )
        found = compare_rollouts(scored(share.leaves, logprobs_A), by_key(wave.rollouts), step)
        sides = share_tracer(trainer, share, sampling), generation_tracer(program, part, sampling)
        total += settle(walk, found, *sides, seek=seek and total.first is None)
        made += rollouts
        tokens, sequences = tokens + share.tokens, sequences + share.sequences
    program.exchange.flush()
    metrics = trainer.update(step_normaliser(conf, rules, tokens, sequences), tokens)
    metrics |= generator.failed_scores("reward/failed", walk.process.cpu_group)
    sync(program)
    return Step(by_key(made), total, metrics, weights_digest(program))


def policy_objective(
    conf: Conf, batch: PackedBatch, logprobs_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_A, clipped_A), as in `recipes/grpo.py`."""
    return policy_loss_T(
        logprobs_A, batch.generator_logprobs_A, batch.advantages_A, conf.clip_low, conf.clip_high
    )


def uneven(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with a little more reward, by their tokens.

    A model that answers everything rightly, or nothing, has rewards without a gradient, and steps
    that change no weight would compare nothing.
    """
    return [
        replace(r, reward=r.reward + zlib.crc32(repr(r.tokens).encode()) / 2**34) for r in rollouts
    ]


def by_key(rollouts: Sequence[Rollout]) -> dict[Key, Rollout]:
    return {(r.prompt_id, r.sample_id): r for r in rollouts}


def share_tracer(trainer: Trainer, share: Share, sampling: Sampling) -> Tracer:
    """Runs the forward passes of a share again and traces one of its rollouts."""

    def trace(key: Key) -> Trace:
        with scoring(trainer, sampling.temperature or 1.0, trainer.conf.trainer.microbatch_tokens):
            return trace_training(trainer, share.leaves, share.token_counts, key)

    return trace


def generation_tracer(program: Program, prompts: Sequence[Prompt], sampling: Sampling) -> Tracer:
    """Generates the prompts' groups again and traces one of the samples."""

    def trace(key: Key) -> Trace:
        generator = program.generator
        requests = generator.requests(prompts, program.exchange.group_size)
        if generator.engine is None or key[0] not in {r.prompt_id for r in requests}:
            return NOTHING
        return trace_generation(generator.engine, requests, sampling, key)

    return trace


def twice_checks(walk: Walk, program: Program) -> Iterator[Check]:
    """The rows of L0; afterwards the program has the weights again that it had before."""
    start = {
        name: tensor.detach().cpu().clone()
        for name, tensor in local_tensors(program.trainer.parameters()).items()
    }
    runs = []
    for _ in range(2):
        runs.append([train_step(walk, program, i, seek=False) for i in range(TWICE)])
        restore(program, start)
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


def rewards(step: Step) -> dict[str, float | str]:
    return {f"reward of {key}": rollout.reward for key, rollout in step.rollouts.items()}


@torch.no_grad()
def restore(program: Program, start: dict[str, torch.Tensor]) -> None:
    """The weights of old, and an optimizer that has not stepped. Collective."""
    trainer = program.trainer
    for name, tensor in local_tensors(trainer.parameters()).items():
        tensor.copy_(start[name])
    if trainer.model is not None:
        trainer.optimizer.state.clear()
    trainer.steps = trainer.updates = 0
    sync(program)


def mixed_check(walk: Walk, program: Program, mixed: Rollouts, sampling: Sampling) -> Check:
    """The row of L2 on the batch of mixed lengths, which every rank has as generated."""
    trainer, temperature = program.trainer, sampling.temperature
    found = compare_rollouts(score_arranged(trainer, mixed, temperature), mixed)
    one = arrangement_tracer(trainer, mixed, temperature)
    other = engine_tracer(program.generator.engine, Way(walk.requests), sampling)
    return Check("L2", "prompts of mixed lengths", settle(walk, found, one, other))


def loop_checks(walk: Walk, program: Program) -> Iterator[Check]:
    """The other rows of L2: steps of the loop, each with new weights, then greedy and warm."""
    steps = walk.conf.validate.steps
    before, total, exact = weights_digest(program), Tally(), Tally()
    for step in range(steps):
        result = train_step(walk, program, step, seek=total.first is None)
        total += result.logprobs
        metrics = {name: result.metrics[name] for name in EXACT if name in result.metrics}
        exact += compare_values(metrics, EXACT if metrics else {}, step)
        exact += _changed(before, result.digest, step)
        before = result.digest
    yield Check("L2", f"{steps} steps of the loop", total)
    yield Check(
        "L2", "ratio and logprob difference of these steps", of_all_ranks(walk.process, exact)
    )
    for name, temperature in (("greedy", 0.0), *((f"temperature {t}", t) for t in WARM)):
        yield Check("L2", f"rollouts, {name}", compare_rollouts_at(walk, program, temperature))


def _changed(before: str, after: str, step: int) -> Tally:
    """A failure where a step left the weights as they were; else nothing, it compares no bits."""
    if before != after:
        return Tally()
    return Tally(0, 1, 0, Place("weights", ("as before", "new ones"), step))


def compare_rollouts_at(walk: Walk, program: Program, temperature: float) -> Tally:
    """Trainer against generator on one more step's prompts at a temperature, without an update."""
    conf, task = walk.conf, walk.parts.task
    trainer, generator, step = program.trainer, program.generator, conf.validate.steps
    prompts = drawn(task.train_prompts(step, conf.num_prompts), conf.num_prompts, "train_prompts")
    sampling = generator.sampling(step, temperature)
    rollouts = generator.rollout(task, prompts, conf.group_size, sampling)
    wave = program.exchange([p.prompt_id for p in prompts], rollouts)
    share = share_of(wave, replace(rules_of(conf), drop_equal_groups=False), trainer.dp)
    with scoring(trainer, temperature or 1.0, conf.trainer.microbatch_tokens):
        found = score(trainer, share.leaves, share.token_counts)
    program.exchange.flush()
    sides = share_tracer(trainer, share, sampling), generation_tracer(program, prompts, sampling)
    return settle(walk, compare_rollouts(found, by_key(wave.rollouts), step), *sides)
