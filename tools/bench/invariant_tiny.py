"""Cost of the switch on a CPU: generation and training of the tiny model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch

from mesh.config.loading import load_conf
from mesh.lifecycle.process import start
from mesh.program.assembly import Program, assemble, check, sync
from mesh.rl.step import Share, advantages_of, credited, share_of
from mesh.tasks import Draw
from mesh.tasks.prompts import step_prompts
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
        plan = check(conf, process)
        program = assemble(plan, process)
        sync(program)
        prompts, _ = step_prompts(plan.prompts, process, Draw(0, plan.step.num_prompts))
        generator, trainer = program.generator, program.trainer
        asked = (program.scorer, prompts, plan.step.group_size, generator.sampling(0))
        wave = program.exchange([p.prompt_id for p in prompts], generator.rollout(*asked))
        share = share_of(wave, plan.step, trainer.dp, trainer.dp_rank, step=0)
        advantages = advantages_of(wave, plan.objective, plan.step.group_size)
        share = credited(share, advantages, plan.objective)
        parts: dict[str, Callable[[], object]] = {
            "generation": partial(generator.rollout, *asked),
            "training": partial(backpropagate, program, share),
        }
        switch = Switch(plan.shape, torch.float32, process.device)
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
    """Forward and backward of a step's passes."""
    trainer, objective = program.trainer, program.plan.objective
    trainer.accumulate(share.passes, objective, trainer.score(share.passes, objective.needs))
