"""Four gloo ranks that bring waves of rollouts across, in one layout after another.

`DIR/RANK.pt` gets the waves that this rank saw, by case. Where the roles are split, the generator
crosses all its waves before the trainer begins with the first: a send that waited would hang.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_ranks

from mesh.config.schema import Conf, GeneratorConf, MeshConf, TrainerConf
from mesh.exchange.rollouts import Exchange, replica_of
from mesh.layout.meshes import Layout, plan_layout
from mesh.types import FinishReason, Rollout, Turn, Wave

GROUP_SIZE = 3
NUM_WAVES = 3
SPLIT = MeshConf(mode="split")
CASES = {
    "split_2_2": Conf(mesh=SPLIT, trainer=TrainerConf(dp_shard=2), num_prompts=12),
    "split_2_2_tp": Conf(
        mesh=SPLIT, trainer=TrainerConf(tp=2), generator=GeneratorConf(tp=2), num_prompts=12
    ),
    "split_3_1": Conf(mesh=SPLIT, trainer=TrainerConf(dp_shard=3), num_prompts=18),
    "split_1_3": Conf(mesh=SPLIT, trainer=TrainerConf(dp_shard=1), num_prompts=18),
    "colocated_tp": Conf(generator=GeneratorConf(tp=2), num_prompts=24),
    "colocated_both_tp": Conf(
        trainer=TrainerConf(tp=2), generator=GeneratorConf(tp=4), num_prompts=12
    ),
}


def prompt_ids(conf: Conf, wave: int) -> list[int]:
    size = conf.num_prompts // NUM_WAVES
    return list(range(wave * size, (wave + 1) * size))


def rollout(prompt_id: int, sample_id: int) -> Rollout:
    """A rollout that tells which it is; some are empty, as a dropped or cut one may be, some have
    tokens of an environment, which have no logprobs, and some have a score with parts.
    """
    length = (prompt_id * 5 + sample_id * 3) % 7
    prompt = tuple(range(prompt_id + 1, prompt_id + 2 + prompt_id % 3))
    tokens = tuple(1000 * prompt_id + 10 * sample_id + i for i in range(length))
    turns: tuple[Turn, ...] = ()
    if length > 3 and prompt_id % 2:
        turns = (Turn(1, True), Turn(2, False), Turn(length - 3, True))
    sampled = length - 2 if turns else length
    logprobs = tuple(-(1 + prompt_id + i / 64) for i in range(sampled))
    finish: FinishReason = "length" if length == 6 else "turns" if turns else "stop"
    parts = (("sample", float(sample_id)), ("é", -prompt_id / 6)) if prompt_id % 4 == 0 else ()
    correct = (None, False, True)[(prompt_id + 2 * sample_id) % 3]
    reward = prompt_id / 3 + sample_id
    return Rollout(
        prompt_id, sample_id, prompt, tokens, logprobs, reward, finish, turns, parts, correct
    )


def mine(layout: Layout, ids: list[int]) -> list[Rollout]:
    """What this rank's replica generates of a wave; the replica's tp ranks have the same."""
    if dist.get_rank() not in layout.generator_ranks:
        return []
    replica = layout.generator_ranks.index(dist.get_rank()) // layout.generator.tp
    owned = [i for i in ids if replica_of(i, layout.generator.dp) == replica]
    return [rollout(i, sample) for i in owned for sample in range(GROUP_SIZE)]


def cross(conf: Conf) -> list[Wave]:
    layout = plan_layout(conf, dist.get_world_size())
    exchange = Exchange(layout, GROUP_SIZE, timedelta(seconds=60))
    split_trainer = layout.mode == "split" and dist.get_rank() in layout.trainer_ranks
    if split_trainer:
        dist.barrier()
    waves = []
    for wave in range(NUM_WAVES):
        ids = prompt_ids(conf, wave)
        waves.append(exchange(ids, mine(layout, ids)))
    if layout.mode == "split" and not split_trainer:
        dist.barrier()
    exchange.flush()
    assert not exchange.pending
    return waves


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    waves = {name: cross(conf) for name, conf in CASES.items()}
    torch.save(waves, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(4, main)
