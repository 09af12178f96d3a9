"""GRPO as one SPMD program: every rank runs these lines in lockstep.

    torchrun --nproc-per-node=2 recipes/grpo.py conf=qwen3_tiny

prompts -> rollouts -> rewards -> exchange -> advantages -> pack -> forward, loss, backward ->
optimizer -> reshard into the generator -> next step. Off its submesh a verb returns an empty shard;
data crosses submeshes in two places, `exchange` and `sync`.

Left out: several updates per batch and off-policy rollouts (the generator always has the newest
weights, so the ratio differs from 1 by rounding only), refilling dropped groups, learned rewards.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mesh.checkpoint.keeper import Checkpointer
from mesh.checkpoint.restart import after_restart
from mesh.config.loading import to_yaml
from mesh.config.schema import Conf
from mesh.exactness.strict import Scored, stop_at_difference
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases, phase_metrics
from mesh.program.assembly import (
    Program,
    assemble,
    check,
    launch,
    read_command,
    rules_of,
    save_model,
    step_normaliser,
    sync,
    weights_digest,
)
from mesh.rl.losses import policy_loss_T
from mesh.rl.packing import PackedBatch
from mesh.rl.step import rollout_metrics, samples_of, share_of, waves_of
from mesh.roles.evaluation import evaluate
from mesh.runs.directory import create_run_dir
from mesh.runs.metrics import MetricsLogger
from mesh.tasks import drawn

Metrics = dict[str, Any]
Sample = dict[str, Any]


def main(argv: list[str]) -> None:
    name, conf = read_command(argv, resumes=True)
    with launch(conf) as process:
        conf = after_restart(conf, process)
        parts = check(conf, process.world_size)
        resume = conf.resume is not None
        run_dir = create_run_dir(process, conf.run_dir, name, to_yaml(conf), resume)
        program = assemble(conf, process, parts)
        checkpoints = Checkpointer(conf, run_dir, process, program.trainer)
        first = checkpoints.load() if resume else 0
        phases = Phases(process.device)
        words, save = asdict(conf), partial(save_model, conf, program)
        with MetricsLogger(run_dir, conf.log, process.rank, conf.steps, words, first) as logger:
            process.listen()
            sync(program)
            if not resume:
                metrics = held_out(conf, program, process)
                logger.log(0, metrics)
                with phases("checkpoint"):
                    checkpoints.consider(0, metrics, save)
            for step in range(first, conf.steps):
                metrics, samples = train_step(conf, program, process, phases, step)
                if is_due(step + 1, conf.eval.every, conf.steps):
                    with phases("eval"):
                        metrics |= held_out(conf, program, process)
                logger.log(step + 1, metrics | timings(phases, metrics, process))
                logger.log_samples(step + 1, chosen(conf, process.gather(samples)))
                stop = process.should_stop()
                with phases("checkpoint"):
                    checkpoints.consider(step + 1, metrics, save)
                    checkpoints.after(step + 1, stop)
                if stop:
                    break
            save(run_dir / "model")


def train_step(
    conf: Conf, program: Program, process: Process, phases: Phases, step: int
) -> tuple[Metrics, list[Sample]]:
    """One step: generate, score, exchange and backpropagate wave by wave, update once, sync."""
    task, trainer, generator = program.parts.task, program.trainer, program.generator
    rules, objective = rules_of(conf), partial(policy_objective, conf)
    prompts = drawn(task.train_prompts(step, conf.num_prompts), conf.num_prompts, "train_prompts")
    waves, tokens, sequences = [], 0, 0
    for part in waves_of(prompts, conf.waves):
        with phases("generate"):
            rollouts = generator.rollout(task, part, conf.group_size, generator.sampling(step))
        with phases("exchange"):
            wave = program.exchange([p.prompt_id for p in part], rollouts)
            share = share_of(wave, rules, trainer.dp)
        with phases("train"):
            generator.release()
            logprobs_A = trainer.accumulate(share.leaves, share.token_counts, objective)
        if conf.check == "strict":
            stop_at_difference(program, process, Scored(step, part, share, logprobs_A))
        waves.append(wave)
        tokens, sequences = tokens + share.tokens, sequences + share.sequences
    program.exchange.flush()
    with phases("train"):
        updated = trainer.update(step_normaliser(conf, rules, tokens, sequences), tokens)
    with phases("sync"):
        sync(program)
        digest = weights_digest(program)
    metrics = updated | rollout_metrics(waves, conf.group_size) | {"digest/weights": digest}
    metrics |= generator.failed_scores("reward/failed", process.cpu_group)
    samples = samples_of(prompts, waves, rules, program.parts.tokenizer.decode)
    return metrics, samples if conf.log.samples < 0 else samples[: conf.log.samples]


def policy_objective(
    conf: Conf, batch: PackedBatch, logprobs_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_A, clipped_A): the clipped surrogate against the policy that generated the tokens."""
    return policy_loss_T(
        logprobs_A, batch.generator_logprobs_A, batch.advantages_A, conf.clip_low, conf.clip_high
    )


def held_out(conf: Conf, program: Program, process: Process) -> Metrics:
    """Accuracy on prompts that training never draws."""
    return evaluate(conf, program.generator, program.parts.task, process.cpu_group)


def timings(phases: Phases, metrics: Metrics, process: Process) -> Metrics:
    """Seconds of each phase, the slowest rank's, tokens per second, and memory on a GPU."""
    seconds = phases.seconds(process.cpu_group)
    tokens = {"generate": "tokens/generated", "train": "tokens/trained"}
    counts = {phase: int(metrics.get(name, 0)) for phase, name in tokens.items()}
    return phase_metrics(seconds, counts) | phases.gpu_memory(process.cpu_group)


def chosen(conf: Conf, parts: list[list[Sample]]) -> list[Sample]:
    """What all ranks have of a step's samples, in order, each once; the first `log.samples`."""
    by_id = {
        (sample["prompt_id"], sample["sample_id"]): sample for part in parts for sample in part
    }
    ordered = [by_id[key] for key in sorted(by_id)]
    return ordered if conf.log.samples < 0 else ordered[: conf.log.samples]


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens now."""
    return step == last or (every > 0 and step % every == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
