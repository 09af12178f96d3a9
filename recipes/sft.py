"""Supervised warm start: a policy that is right now and then, so that GRPO has something to find.

    torchrun --nproc-per-node=2 recipes/sft.py conf=qwen3_tiny

prompts -> solutions -> pack -> forward, cross entropy, backward -> optimizer -> Hugging Face directory.
Starts from random weights. Left out: epochs, packing across examples by length, learning-rate decay;
the warm start of a small task needs none of them. It also made the checkpoint that ships with the
package (`sft.output=mesh/data/qwen3_tiny`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mesh.batch import Leaf, assign, leaves
from mesh.cli import load_conf, to_yaml
from mesh.conf import Conf
from mesh.evaluate import evaluate
from mesh.metrics import MetricsLogger, Phases
from mesh.process import start
from mesh.program import Parts, assemble, check, save_model, sync
from mesh.run import create_run_dir
from mesh.types import Prompt, Rollout


def main(argv: list[str]) -> None:
    name, conf = load_conf(argv)
    conf.trainer.lr, conf.steps, conf.kl_coef = conf.sft.lr, conf.sft.steps, 0.0
    conf.model.path, conf.model.init, conf.model.tokenizer = None, "random", conf.model.tokenizer
    with start(conf.device, conf.timeout_seconds) as process:
        parts = check(conf, process.world_size)
        run_dir = create_run_dir(process, conf.run_dir, f"sft-{name}", to_yaml(conf))
        program = assemble(conf, process, parts)
        trainer, phases = program.trainer, Phases(process.device)
        with MetricsLogger(process, run_dir, conf) as logger:
            for step in range(conf.steps):
                prompts = parts.task.train_prompts(step, conf.sft.batch_size)
                shares = [
                    examples(parts, prompts, ids) for ids in assign(range(len(prompts)), trainer.dp)
                ]
                counts = [[leaf.num_tokens for leaf in share] for share in shares]
                tokens = sum(
                    len(r.tokens) for share in shares for leaf in share for r in leaf.rollouts
                )
                with phases("train"):
                    trainer.accumulate(shares[trainer.dp_rank or 0], counts, cross_entropy)
                    metrics = trainer.update(normaliser=tokens, tokens=tokens)
                logger.log(step, metrics | phases.metrics({"train": tokens}))
            sync(program)
            logger.log(
                conf.steps,
                evaluate(conf, program.meshes, program.generator, parts.task, process.cpu_group),
            )
            save_model(conf, program, Path(conf.sft.output or run_dir / "model"))


def examples(parts: Parts, prompts: list[Prompt], ids: list[int]) -> list[Leaf]:
    """One leaf per prompt of `ids`: the prompt, then its solution and the end-of-sequence token."""
    rollouts = []
    for i in ids:
        prompt = tuple(parts.tokenizer.encode(prompts[i].text))
        answer = tuple(parts.tokenizer.encode(parts.task.solution(prompts[i])))
        tokens = (*answer, parts.tokenizer.eos_ids[0])
        rollouts.append(Rollout(i, 0, prompt, tokens, (0.0,) * len(tokens), 1.0, "stop"))
    ones_R = torch.ones(len(rollouts))
    return leaves(rollouts, ones_R, ones_R)


def cross_entropy(_: object, logprobs_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of supervised training; nothing is clipped."""
    return -logprobs_A, torch.zeros_like(logprobs_A, dtype=torch.bool)


if __name__ == "__main__":
    main(sys.argv[1:])
