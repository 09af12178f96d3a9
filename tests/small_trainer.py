"""A trainer of the tiny model on one rank, and rollouts for it."""

from __future__ import annotations

import torch

from mesh.config.loading import load_conf
from mesh.config.schema import Conf
from mesh.layout.meshes import build_meshes, plan_layout
from mesh.model.families import TINY
from mesh.rl.losses import policy_loss_T
from mesh.rl.packing import Leaf, leaves
from mesh.roles.trainer import Start, Trainer
from mesh.types import Rollout

CPU = torch.device("cpu")
ADVANTAGES = (1.0, -0.5, 0.25, -0.75)


def conf_of(*words: str) -> Conf:
    return load_conf(["conf=qwen3_tiny", "trainer.lr=1e-3", "trainer.warmup_steps=0", *words])[1]


def trainer_of(conf: Conf) -> Trainer:
    meshes = build_meshes(plan_layout(conf, 1), "cpu")
    return Trainer(conf, meshes, TINY, CPU, torch.float32, Start(None, seed=3))


def some_leaves() -> list[Leaf]:
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
    return leaves(rollouts, torch.tensor(ADVANTAGES), torch.full((4,), 0.5))


def objective(conf: Conf, batch, logprobs_A):
    return policy_loss_T(
        logprobs_A, batch.generator_logprobs_A, batch.advantages_A, conf.clip_low, conf.clip_high
    )
