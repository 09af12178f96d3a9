"""Two gloo ranks that train in one layout after another while one of them has a fault.

`nonfinite_program.py DIR`: DIR/LAYOUT/nonfinite.jsonl is what the trainer wrote,
DIR/RANK.pt what this rank saw, by layout: of every fault whether the step was skipped and changed
no bit, then that of a sound step, of one in which the last prompt alone has advantages and of one
in which none has, and the error of a last faulty step under on_nonfinite=stop.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_ranks

from mesh.config.schema import Conf, TrainerConf
from mesh.layout.holdings import local_tensors
from mesh.layout.meshes import build_meshes, plan_layout
from mesh.model.families import TINY
from mesh.rl.cutting import owner
from mesh.rl.losses import Loss, LossTokens, TokenLoss
from mesh.rl.objective import Objective
from mesh.rl.packing import Leaf, leaves
from mesh.rl.step import Pass, passes_of
from mesh.roles.optimizer import OptimizerSettings
from mesh.roles.trainer import Trainer
from mesh.roles.trainer_settings import Start, TrainerSettings
from mesh.types import Rollout

LAYOUTS = {"shard": (1, 2, 1), "replicate": (2, 1, 1), "tp": (1, 1, 2)}
BROKEN_RANK = 1
FAULTS = ("rollout", "gradient", "weight")
PARAMETER = "layers.1.attention_norm.weight"


CPU = torch.device("cpu")
SETTINGS = TrainerSettings(
    shape=TINY,
    max_length=64,
    dtype=torch.float32,
    start=Start(None, 3),
    temperature=1.0,
    optimizer=OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.0, warmup_steps=0, clip_norm=1.0),
    on_nonfinite="skip",
)
PASS_TOKENS = 16384


def reinforce(tokens: LossTokens) -> TokenLoss:
    """-advantage * logprob, which nothing clips."""
    clipped_T = torch.zeros_like(tokens.logprobs_T, dtype=torch.bool)
    return TokenLoss(-tokens.logprobs_T * tokens.advantages_T, clipped_T)


def rollouts() -> list[Rollout]:
    ids = [(prompt_id, sample_id) for prompt_id in range(4) for sample_id in range(2)]
    return [
        Rollout(p, s, (1 + p, 2, 3), tuple(range(5, 8 + p + s)), (-1.0,) * (3 + p + s), 0.0, "stop")
        for p, s in ids
    ]


def with_infinity(rollout: Rollout) -> Rollout:
    """Prompt 3, which the second of two ranks trains on, has a logprob of +inf in one sample."""
    if (rollout.prompt_id, rollout.sample_id) != (3, 1):
        return rollout
    return replace(rollout, logprobs=(*rollout.logprobs[:4], torch.inf, *rollout.logprobs[5:]))


def share_of(trainer: Trainer, broken: bool, equal: int) -> tuple[list[Pass], int]:
    """This rank's passes, and the loss tokens of the step; equal: prompts without advantages."""
    made = [with_infinity(r) if broken else r for r in rollouts()]
    advantages_R, weights_R = torch.linspace(-1, 1, len(made)), torch.full((len(made),), 0.25)
    advantages_R[: 2 * equal] = 0
    by_rank: list[list[Leaf]] = [[] for _ in range(trainer.dp)]
    for leaf in leaves(made, advantages_R, weights_R):
        by_rank[owner(leaf.prompt_id, trainer.dp)].append(leaf)
    counts = [[leaf.num_tokens for leaf in mine] for mine in by_rank]
    assert trainer.dp_rank is not None
    passes = passes_of(by_rank[trainer.dp_rank], counts, trainer.dp_rank, PASS_TOKENS)
    return passes, sum(r.length for r in made)


@contextmanager
def broken_gradient(trainer: Trainer) -> Iterator[None]:
    """One rank's own part of a gradient has a NaN; a norm's weight is replicated over tp."""

    def spoil(parameter: torch.Tensor) -> None:
        if dist.get_rank() == BROKEN_RANK:
            assert parameter.grad is not None
            parameter.grad.to_local()[2] = torch.nan

    handle = trainer.parameters()[PARAMETER].register_post_accumulate_grad_hook(spoil)
    yield
    handle.remove()


@contextmanager
def broken_weight(trainer: Trainer) -> Iterator[None]:
    """One rank's own part of a weight has a NaN, for the time of a step."""
    with torch.no_grad():
        local = trainer.parameters()[PARAMETER].to_local()
        old = local.clone()
        if dist.get_rank() == BROKEN_RANK:
            local[2] = torch.nan
        yield
        local.copy_(old)


def step(trainer: Trainer, fault: str | None, equal: int = 0) -> dict[str, float]:
    passes, tokens = share_of(trainer, fault == "rollout", equal)
    objective = Objective(Loss(reinforce))
    broken = {"gradient": broken_gradient, "weight": broken_weight}.get(fault or "")
    with broken(trainer) if broken else nullcontext(), torch.enable_grad():
        trainer.accumulate(passes, objective, trainer.score(passes, objective.needs))
        return trainer.update(3.0, tokens)


def bits_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {f"{kind}/{n}": t for kind, part in trainer.state().items() for n, t in part.items()}
    with torch.no_grad():
        return {name: tensor.clone() for name, tensor in local_tensors(state).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def train(path: Path, layout: str) -> dict:
    replicate, shard, tp = LAYOUTS[layout]
    conf = Conf(trainer=TrainerConf(dp_replicate=replicate, dp_shard=shard, tp=tp))
    meshes = build_meshes(plan_layout(conf, 2), "cpu")
    (path / layout).mkdir(exist_ok=True)
    trainer = Trainer(SETTINGS, meshes, CPU, str(path / layout))
    step(trainer, None)
    seen: dict = {}
    for fault in FAULTS:
        before = bits_of(trainer)
        metrics = step(trainer, fault)
        seen[fault] = metrics["skipped"], same(before, bits_of(trainer))
    seen["sound"] = step(trainer, None)["skipped"], same(before, bits_of(trainer))
    for name, equal in (("lonely", 3), ("equal", 4)):
        before = bits_of(trainer)
        metrics = step(trainer, None, equal)
        seen[name] = metrics["steps_without_signal"], same(before, bits_of(trainer))
    seen["counts"] = trainer.steps, trainer.updates
    trainer.settings, before = replace(SETTINGS, on_nonfinite="stop"), bits_of(trainer)
    try:
        step(trainer, "gradient")
    except RuntimeError as error:
        seen["stop"] = str(error), same(before, bits_of(trainer))
    return seen


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    path = Path(sys.argv[1])
    seen = {layout: train(path, layout) for layout in LAYOUTS}
    torch.save(seen, path / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(2, main)
