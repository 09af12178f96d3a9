"""Supervised warm start: a policy that is right now and then, so that GRPO has something to find.

    torchrun --nproc-per-node=2 recipes/sft.py conf=qwen3_tiny

prompts -> solutions -> pack -> forward, cross entropy, backward -> optimizer -> saved model.
Starts from random weights. Left out: epochs, learning-rate decay, packing by length; the warm start
of a small task needs none of them. It also made the checkpoint that ships with the package
(one process, `sft.output=mesh/data/qwen3_tiny`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mesh.batch import Leaf, PackedBatch, assign, leaves
from mesh.cli import to_yaml
from mesh.conf import Conf
from mesh.evaluate import evaluate
from mesh.metrics import MetricsLogger
from mesh.phases import Phases, phase_metrics
from mesh.program import Parts, Program, assemble, check, launch, read_command, save_model, sync
from mesh.run import create_run_dir
from mesh.types import Prompt, Rollout

# metrics that compare with the policy that generated the tokens, which here is nobody's
OF_A_GENERATOR = ("logprob_diff/", "ratio/", "clip_fraction")


def main(argv: list[str]) -> None:
    name, conf = read_command(argv)
    conf = supervised(conf)
    with launch(conf) as process:
        parts = check(conf, process.world_size)
        run_dir = create_run_dir(process, conf.run_dir, f"sft-{name}", to_yaml(conf))
        program = assemble(conf, process, parts)
        phases = Phases(process.device)
        with MetricsLogger(run_dir, conf.log, process.rank, conf.steps) as logger:
            for step in range(conf.steps):
                with phases("train"):
                    metrics = train_step(conf, program, step)
                seconds = phases.seconds(process.cpu_group)
                metrics |= phase_metrics(seconds, {"train": int(metrics.get("tokens/trained", 0))})
                if step + 1 == conf.steps:
                    sync(program)
                    metrics |= evaluate(conf, program.generator, parts.task, process.cpu_group)
                logger.log(step + 1, metrics)
            save_model(conf, program, Path(conf.sft.output or run_dir / "model"))


def supervised(conf: Conf) -> Conf:
    """The configuration with the supervised steps and learning rate, from random weights."""
    conf.trainer.lr, conf.steps, conf.kl_coef = conf.sft.lr, conf.sft.steps, 0.0
    conf.model.path, conf.model.init = None, "random"
    return conf


def train_step(conf: Conf, program: Program, step: int) -> dict[str, float]:
    """Cross entropy of the solutions of one batch of training prompts, and one update."""
    trainer = program.trainer
    prompts = program.parts.task.train_prompts(step, conf.sft.batch_size)
    owned = assign(range(len(prompts)), trainer.dp)
    shares = [examples(program.parts, [prompts[i] for i in ids]) for ids in owned]
    counts = [[leaf.num_tokens for leaf in share] for share in shares]
    tokens = sum(len(r.tokens) for share in shares for leaf in share for r in leaf.rollouts)
    trainer.accumulate(shares[trainer.dp_rank or 0], counts, cross_entropy)
    metrics = trainer.update(normaliser=tokens, tokens=tokens)
    return {name: value for name, value in metrics.items() if not name.startswith(OF_A_GENERATOR)}


def examples(parts: Parts, prompts: list[Prompt]) -> list[Leaf]:
    """A leaf per prompt: the prompt, then its solution and the end-of-sequence token."""
    rollouts = []
    for prompt in prompts:
        question = tuple(parts.tokenizer.encode(prompt.text))
        answer = tuple(parts.tokenizer.encode(parts.task.solution(prompt)))
        tokens = (*answer, parts.tokenizer.eos_ids[0])
        unknown = (0.0,) * len(tokens)
        rollouts.append(Rollout(prompt.prompt_id, 0, question, tokens, unknown, 1.0, "stop"))
    ones_R = torch.ones(len(rollouts))
    return leaves(rollouts, ones_R, ones_R)


def cross_entropy(_: PackedBatch, logprobs_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_A, clipped_A) of supervised training: nothing is clipped."""
    return -logprobs_A, torch.zeros_like(logprobs_A, dtype=torch.bool)


if __name__ == "__main__":
    main(sys.argv[1:])
