"""GRPO as one SPMD program: every rank runs these lines in lockstep.

    torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny

prompts -> rollouts -> rewards -> exchange -> score -> advantages -> forward, loss, backward ->
optimizer -> reshard into the generator -> next step. Off its submesh a verb returns an empty shard;
data crosses submeshes in two places, `exchange` and `sync`.

With updates_per_step > 1 the rollouts are cut into minibatches, and forward to optimizer are taken
for each; what is scored is scored for all of them before the first update.

Left out: off-policy rollouts (the generator always has the newest weights, so in a step's first
update the ratio differs from 1 by rounding only), learned rewards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.restart import after_restart
from mesh.config.loading import to_yaml
from mesh.config.schema import Conf
from mesh.exactness.strict import stop_at_difference
from mesh.lifecycle.memory import trim
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
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
from mesh.program.averaged import averaged_weights
from mesh.program.encoding import dated
from mesh.program.groups import groups_of, joined, remember
from mesh.program.records import scored, step_record, together
from mesh.program.shared import inputs_of
from mesh.program.timings import Timings, note_sync
from mesh.program.warnings import start_warnings
from mesh.rl.objective import Objective
from mesh.rl.samples import StepRecord
from mesh.rl.statistics import rollout_metrics
from mesh.rl.step import (
    Minibatch,
    ScoredWave,
    advantages_of,
    credited,
    share_of,
    waves_of,
    with_scores,
)
from mesh.rl.updates import step_metrics
from mesh.roles.divergences import reward_divergences
from mesh.roles.evaluation import Evaluation, evaluate
from mesh.roles.generator import failed_scores
from mesh.roles.passes import PassScores, old_scores
from mesh.roles.trainer import Trainer
from mesh.runs.directory import create_run_dir
from mesh.runs.evaluations import results_path, write_results
from mesh.runs.metrics import MetricsLogger
from mesh.runs.profiles import profiled
from mesh.runs.sample_rows import row_of
from mesh.runs.stopping import early_stop
from mesh.tasks import Draw
from mesh.tasks.prompts import step_prompts

Metrics = dict[str, Any]
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
        stopping = early_stop(conf.stop, run_dir, process, resume)
        phases, save = Phases(process.device), partial(save_model, program)
        inspect = stop_at_difference if plan.strict else None
        rows = partial(row_of, plan.tokenizer, conf.log.tokens)
        timings = Timings(program, process, phases, run_dir if conf.log.timeline else None)
        with MetricsLogger(
            run_dir, conf.log, process.rank, conf.steps, asdict(conf), first, rows
        ) as logger:
            checkpoints.follow(logger.mark)
            process.listen()
            sync(program)
            if not resume:
                with phases("eval"):
                    record = held_out(program, process, results_file(conf, run_dir, 0))
                measured = timings(0, record.metrics)
                logger.log(
                    0, record.metrics | measured, together(process, conf.seed, 0, record.samples)
                )
                stopping.see(0, record.metrics)
                with phases("checkpoint"):
                    checkpoints.consider(0, record.metrics, save)
            steps = range(first, conf.steps)
            for step in profiled(steps, conf.profile, run_dir, process, logger.leave_out):
                if stopping.reason and not checkpoints.unlogged:
                    break
                record = checkpoints.to_log() or train_step(program, process, phases, step, inspect)
                checkpoints.trained(step + 1, record)
                if is_due(step + 1, conf.eval.every, conf.steps):
                    with phases("eval"):
                        record += held_out(program, process, results_file(conf, run_dir, step + 1))
                trim(step + 1)
                metrics = record.metrics | timings(step + 1, record.metrics)
                with phases("log", host=True):
                    samples = together(process, conf.seed, step, record.samples)
                    logger.log(step + 1, metrics, samples, record.histograms)
                stopping.see(step + 1, metrics)
                stop = process.should_stop()
                with phases("checkpoint"):
                    checkpoints.consider(step + 1, metrics, save)
                    checkpoints.after(step + 1, stop, bool(stopping.reason))
                if stop:
                    break
            if stopping.reason:
                process.say(f"the run ends here: {stopping.reason}")
            save(run_dir / "model")


def train_step(
    program: Program, process: Process, phases: Phases, step: int, inspect: Inspect | None = None
) -> StepRecord:
    """One step: generate, score, exchange and backpropagate wave by wave, update, sync.

    The only one: replays, strict runs and validation take this step. Returns what is to be logged
    of it. `inspect` sees each wave while both sides still have the weights that drew it.
    """
    plan, trainer, generator = program.plan, program.trainer, program.generator
    objective, keys = plan.objective, plan.step
    draw = Draw(step, keys.num_prompts)
    prompts, drawn = step_prompts(plan.prompts, process, draw, program.pass_rates)
    advantages: dict[int, list[float]] = {}
    made, trained, tokens, sequences = [], [], 0, 0
    for part in waves_of(prompts, keys.waves):
        groups = groups_of(program, process, phases, step, part)
        with phases("train", plan.meetings.passes):
            generator.release()
            wave = groups.wave
            share = share_of(wave, keys, trainer.dp, trainer.dp_rank, step)
            known = trainer.score(share.passes, objective.needs, policy=keys.updates > 1)
            divergences = reward_divergences(share.passes, known, objective, trainer.cpu_group)
            advantages |= advantages_of(wave, objective, keys.group_size, divergences)
            share = credited(share, advantages, objective)
            (first, scores), *later = with_scores(share, known)
            now = trainer.accumulate(first.passes, objective, scores)
        old_A = old_scores(known, now)
        if inspect is not None:
            drawn_by = old_A.logprobs_A
            seen = ScoredWave(step, groups.prompts, groups.generated, wave, share, drawn_by)
            inspect(program, process, seen)
        made.append(groups)
        trained.append(scored(share.rollouts, old_A))
        tokens, sequences = tokens + first.tokens, sequences + first.sequences
    with phases("exchange", plan.meetings.flush, host=True):
        program.exchange.flush()
    with phases("train", plan.meetings.update):
        updates = [trainer.update(objective.normaliser(tokens, sequences), tokens)]
        updates += later_updates(trainer, objective, later, keys.kl_stop)
    with phases("sync", plan.meetings.sync):
        report = sync(program)
        digest = weights_digest(program)
    note_sync(phases, report)
    answered = joined(made, drawn)
    metrics: Metrics = {**step_metrics(updates), **answered.metrics, "digest/weights": digest}
    metrics |= rollout_metrics([answered.drawn], keys.group_size, objective.length_penalty)
    metrics |= failed_scores(program.scorer, "reward/failed", process.cpu_group)
    metrics |= remember(program, process, step, answered)
    return step_record(program, step, metrics, answered, advantages, trained)


def later_updates(
    trainer: Trainer,
    objective: Objective,
    minibatches: Sequence[tuple[Minibatch, list[PassScores]]],
    kl_stop: float,
) -> list[Metrics]:
    """A step's updates after the first, each on a minibatch of its own; their metrics.

    The ratio is to the policy that the step began with. Where the KL from it, on the next minibatch
    and over all ranks, is above `kl_stop`, neither that update is made nor any after it. One that
    is not finite is the update's to report.
    """
    updates: list[Metrics] = []
    for number, (minibatch, scores) in enumerate(minibatches, 1):
        trainer.accumulate(minibatch.passes, objective, scores)
        if kl_stop < trainer.approx_kl() < inf:
            return [*updates, trainer.leave_out()]
        normaliser = objective.normaliser(minibatch.tokens, minibatch.sequences)
        updates.append(trainer.update(normaliser, minibatch.tokens, number))
    return updates


def held_out(program: Program, process: Process, results: Path | None = None) -> StepRecord:
    """The metrics of every evaluation set, on prompts that training never draws, and the answers
    that are kept; every prompt's results go to the file `results`, if there is one. By the averaged
    weights of a run that has them."""
    with averaged_weights(program):
        found = evaluations(program, process, rows=results is not None)
    if results is not None:
        write_results(results, found, process)
    metrics = {name: value for one in found.values() for name, value in one.metrics.items()}
    return StepRecord(metrics, [sample for one in found.values() for sample in one.samples])


def evaluations(program: Program, process: Process, rows: bool = False) -> dict[str, Evaluation]:
    """Every evaluation set, by name, under the weights of the last sync."""
    scorers, group = program.evaluation_scorers, process.cpu_group
    return {
        name: evaluate(held, program.generator, scorers[name], group, name, rows)
        for name, held in program.plan.evaluations.items()
    }


def results_file(conf: Conf, run_dir: Path, step: int) -> Path | None:
    """The file of an evaluation's results; None: it is not asked for."""
    return results_path(run_dir, step) if conf.log.evaluations else None


def is_due(step: int, every: int, last: int) -> bool:
    """True if something that happens every so many steps, and after the last one, happens now."""
    return step == last or (every > 0 and step % every == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
