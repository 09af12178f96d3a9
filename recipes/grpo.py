"""GRPO as one SPMD program: every rank runs these lines in lockstep.

    torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny

prompts -> rollouts -> rewards -> exchange -> score -> advantages -> forward, loss, backward ->
optimizer -> reshard into the generator -> next step. Off its submesh a verb returns an empty shard;
data crosses submeshes in two places, `exchange` and `sync`.

Left out: several updates per batch and off-policy rollouts (the generator always has the newest
weights, so the ratio differs from 1 by rounding only), learned rewards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.restart import after_restart
from mesh.config.loading import to_yaml
from mesh.exactness.strict import stop_at_difference
from mesh.lifecycle.memory import trim
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases, phase_metrics
from mesh.program.assembly import (
    Program,
    assemble,
    check,
    launch,
    read_command,
    save_model,
    sync,
    weights_digest,
)
from mesh.program.encoding import dated
from mesh.program.groups import groups_of, joined, remember
from mesh.program.shared import inputs_of
from mesh.program.warnings import start_warnings
from mesh.rl.statistics import rollout_metrics
from mesh.rl.step import ScoredWave, advantages_of, credited, samples_of, share_of, waves_of
from mesh.roles.evaluation import evaluate
from mesh.roles.generator import failed_scores
from mesh.runs.directory import create_run_dir
from mesh.runs.metrics import MetricsLogger
from mesh.tasks import Draw
from mesh.tasks.prompts import step_prompts
from mesh.tasks.transcript import shown

Metrics = dict[str, Any]
Sample = dict[str, Any]
Inspect = Callable[[Program, Process, ScoredWave], None]
"""Sees every wave before the optimizer's step, on all ranks; see `train_step`."""


def main(argv: list[str]) -> None:
    name, conf = read_command(argv, resumes=True)
    with launch(conf) as process:
        conf = dated(after_restart(conf, process), process)
        plan = check(conf, process)
        resume = conf.resume is not None
        run_dir = create_run_dir(process, conf.run_dir, name, to_yaml(conf), resume)
        for warning in start_warnings(plan):
            process.say(warning)
        program = assemble(plan, process)
        inputs = inputs_of(conf, plan)
        checkpoints = Checkpointer(
            conf, run_dir, process, program.trainer, inputs, program.pass_rates
        )
        first = checkpoints.load() if resume else 0
        phases, save = Phases(process.device), partial(save_model, program)
        inspect = stop_at_difference if plan.strict else None
        with MetricsLogger(
            run_dir, conf.log, process.rank, conf.steps, asdict(conf), first
        ) as logger:
            process.listen()
            sync(program)
            if not resume:
                metrics = held_out(program, process)
                logger.log(0, metrics)
                with phases("checkpoint"):
                    checkpoints.consider(0, metrics, save)
            for step in range(first, conf.steps):
                metrics, samples = checkpoints.to_log() or train_step(
                    program, process, phases, step, inspect
                )
                checkpoints.trained(step + 1, metrics, samples)
                if is_due(step + 1, conf.eval.every, conf.steps):
                    with phases("eval"):
                        metrics |= held_out(program, process)
                trim(step + 1)
                logger.log(step + 1, metrics | timings(phases, metrics, process))
                logger.log_samples(step + 1, chosen(conf.log.samples, process, samples))
                stop = process.should_stop()
                with phases("checkpoint"):
                    checkpoints.consider(step + 1, metrics, save)
                    checkpoints.after(step + 1, stop)
                if stop:
                    break
            save(run_dir / "model")


def train_step(
    program: Program, process: Process, phases: Phases, step: int, inspect: Inspect | None = None
) -> tuple[Metrics, list[Sample]]:
    """One step: generate, score, exchange and backpropagate wave by wave, update once, sync.

    The only one: replays, strict runs and validation take this step. Returns its metrics, and this
    rank's samples. `inspect` sees each wave while both sides still have the weights that drew it.
    """
    plan, trainer, generator = program.plan, program.trainer, program.generator
    objective, keys = plan.objective, plan.step
    draw = Draw(step, keys.num_prompts)
    prompts, drawn = step_prompts(plan.prompts, process, draw, program.pass_rates)
    advantages: dict[int, list[float]] = {}
    made, tokens, sequences = [], 0, 0
    for part in waves_of(prompts, keys.waves):
        groups = groups_of(program, process, phases, step, part)
        with phases("train"):
            generator.release()
            wave, share = groups.wave, share_of(groups.wave, keys, trainer.dp, trainer.dp_rank)
            known = trainer.score(share.passes, objective.needs)
            advantages |= advantages_of(wave, objective, keys.group_size)
            share = credited(share, advantages, objective)
            scores = trainer.accumulate(share.passes, objective, known)
        if inspect is not None:
            seen = ScoredWave(step, groups.prompts, groups.generated, wave, share, *scores)
            inspect(program, process, seen)
        made.append(groups)
        tokens, sequences = tokens + share.tokens, sequences + share.sequences
    program.exchange.flush()
    with phases("train"):
        updated = trainer.update(objective.normaliser(tokens, sequences), tokens)
    with phases("sync"):
        sync(program)
        digest = weights_digest(program)
    answered = joined(made, drawn)
    metrics = {**updated, **rollout_metrics([answered.drawn], keys.group_size), **answered.metrics}
    metrics |= failed_scores(program.scorer, "reward/failed", process.cpu_group)
    metrics |= remember(program, process, step, answered)
    samples = samples_of(
        answered.prompts, [answered.drawn], advantages, partial(shown, plan.tokenizer),
        keys.log_tokens, answered.left_out,
    )  # fmt: skip
    return metrics | {"digest/weights": digest}, samples


def held_out(program: Program, process: Process) -> Metrics:
    """Accuracy on prompts that training never draws, of every evaluation set."""
    metrics: Metrics = {}
    for name, held in program.plan.evaluations.items():
        prefix = f"eval/{name}" if name else "eval"
        scorer = program.evaluation_scorers[name]
        metrics |= evaluate(held, program.generator, scorer, process.cpu_group, prefix)
    return metrics


def timings(phases: Phases, metrics: Metrics, process: Process) -> Metrics:
    """Seconds of each phase, the slowest rank's, tokens per second, and memory on a GPU."""
    seconds = phases.seconds(process.cpu_group)
    tokens = {"generate": "tokens/generated", "train": "tokens/trained"}
    ran = {phase: name for phase, name in tokens.items() if phase in seconds}
    counts = {phase: int(metrics.get(name, 0)) for phase, name in ran.items()}
    return phase_metrics(seconds, counts) | phases.gpu_memory(process.cpu_group)


def chosen(num: int, process: Process, mine: list[Sample]) -> list[Sample]:
    """The first `num` of all ranks' samples (-1: all), in order, each once. Collective."""
    by_key = {
        (sample["prompt_id"], sample["sample_id"]): sample
        for part in process.gather(mine if num < 0 else mine[:num])
        for sample in part
    }
    ordered = [by_key[key] for key in sorted(by_key)]
    return ordered if num < 0 else ordered[:num]


def is_due(step: int, every: int, last: int) -> bool:
    """True if something that happens every so many steps, and after the last one, happens now."""
    return step == last or (every > 0 and step % every == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
