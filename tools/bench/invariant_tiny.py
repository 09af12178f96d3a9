"""The switch's cost on a CPU: generation and training of the tiny model, both modes in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch

from mesh.config.loading import load_conf
from mesh.lifecycle.process import start
from mesh.program.assembly import Program, assemble, check, rules_of, sync
from mesh.rl.losses import policy_loss_T
from mesh.rl.packing import PackedBatch
from mesh.rl.step import Share, share_of
from mesh.tasks import drawn
from tools.bench.report import print_row
from tools.bench.timing import Switch, paired

MOST = {"generation": 2.0, "training": 1.5}
REPEATS = 7


def bench_tiny() -> list[str]:
    """Rows for generation and training of a step of the main job; returns the targets missed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # or `start` takes every core
    torch.set_num_threads(1)
    _, conf = load_conf(["conf=qwen3_tiny", "device=cpu"])
    with start("cpu", 600) as process:
        program = assemble(conf, process, check(conf, process.world_size))
        sync(program)
        prompts = drawn(program.parts.task.train_prompts(0, 64), 64, "train_prompts")
        generator = program.generator
        asked = (program.parts.task, prompts, conf.group_size, generator.sampling(0))
        wave = program.exchange([p.prompt_id for p in prompts], generator.rollout(*asked))
        share = share_of(wave, rules_of(conf), program.trainer.dp)
        parts: dict[str, Callable[[], object]] = {
            "generation": partial(generator.rollout, *asked),
            "training": partial(backpropagate, program, share),
        }
        switch = Switch(program.parts.shape, torch.float32, process.device)
        return [line for name, part in parts.items() for line in compare(switch, name, part)]


def compare(switch: Switch, name: str, part: Callable[[], object]) -> list[str]:
    def run(on: bool) -> None:
        with switch(on):
            part()

    off, on = paired(partial(run, False), partial(run, True), repeats=REPEATS)
    print_row(f"{name} (tiny, CPU)", f"off {off:.3f} s", f"on {on:.3f} s", f"{on / off:.2f}")
    limit = MOST[name]
    return [f"{name} on a CPU: {on / off:.2f}, over {limit}"] if on > limit * off else []


def backpropagate(program: Program, share: Share) -> None:
    """Forward and backward of a step's leaves."""
    program.trainer.accumulate(share.leaves, share.token_counts, objective)


def objective(batch: PackedBatch, logprobs_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return policy_loss_T(
        logprobs_A, batch.generator_logprobs_A, batch.advantages_A, clip_low=0.2, clip_high=0.2
    )
