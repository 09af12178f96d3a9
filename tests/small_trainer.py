"""A trainer of the tiny model on one rank, and rollouts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.layout.meshes import build_meshes, plan_layout
from mesh.model.families import TINY
from mesh.model.logprobs import TokenScores
from mesh.program.loss import run_objective
from mesh.program.plan import trainer_settings
from mesh.rl.loading import load_loss
from mesh.rl.objective import Objective
from mesh.rl.packing import Leaf, leaves
from mesh.rl.step import Pass, passes_of
from mesh.roles.trainer import Trainer
from mesh.roles.trainer_settings import Start, TrainerSettings
from mesh.types import Rollout

CPU = torch.device("cpu")
ADVANTAGES = (1.0, -0.5, 0.25, -0.75)


def conf_of(*words: str) -> Conf:
    return load_conf(["conf=qwen3_tiny", "trainer.lr=1e-3", "trainer.warmup_steps=0", *words])[1]


def objective_for(conf: Conf) -> Objective:
    """The objective that a configuration asks for."""
    return run_objective(conf, load_loss(conf.loss))


def settings_of(conf: Conf) -> TrainerSettings:
    """The trainer's part of a plan; the weights are random ones."""
    settings = trainer_settings(conf, TINY, "cpu", objective_for(conf))
    start = Start(None, seed=3)
    frozen = {name: replace(source, start=start) for name, source in settings.frozen.items()}
    return replace(settings, start=start, frozen=frozen)


def built(settings: TrainerSettings, conf: Conf, run_dir: Path | None = None) -> Trainer:
    meshes = build_meshes(plan_layout(conf, 1), "cpu")
    return Trainer(settings, meshes, CPU, None if run_dir is None else str(run_dir))


def trainer_of(conf: Conf, run_dir: Path | None = None) -> Trainer:
    return built(settings_of(conf), conf, run_dir)


def some_rollouts() -> list[Rollout]:
    """Four rollouts of two prompts, of unequal lengths, as if another policy had drawn them."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 98, (count,), generator=generator).tolist())

    rollouts = []
    for prompt_id, length in enumerate((4, 7)):
        prompt = tokens(length)
        for sample_id in range(2):
            response = tokens(3 + prompt_id + sample_id)
            logprobs = tuple(-4.5 - 0.1 * i for i in range(len(response)))
            rollouts.append(Rollout(prompt_id, sample_id, prompt, response, logprobs, 1.0, "stop"))
    return rollouts


def leaves_of(rollouts: Sequence[Rollout]) -> list[Leaf]:
    """Their leaves; every token weighs 0.5."""
    advantages_R = torch.tensor(ADVANTAGES[: len(rollouts)])
    return leaves(rollouts, advantages_R, torch.full((len(rollouts),), 0.5))


def some_leaves() -> list[Leaf]:
    return leaves_of(some_rollouts())


def passes_in(share: Sequence[Leaf], max_tokens: int = 4096) -> list[Pass]:
    """The passes of a world of one rank that has these leaves."""
    return passes_of(share, [[leaf.num_tokens for leaf in share]], 0, max_tokens)


def accumulate(trainer: Trainer, passes: Sequence[Pass], objective: Objective) -> TokenScores:
    """Both phases of a wave, as the recipe takes them."""
    return trainer.accumulate(passes, objective, trainer.score(passes, objective.needs))


def num_tokens(share: Sequence[Leaf]) -> int:
    """Loss tokens of these leaves."""
    return sum(r.length for leaf in share for r in leaf.rollouts)
