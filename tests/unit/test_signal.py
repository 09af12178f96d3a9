"""Steps whose gradient is exactly 0: nothing changes but the time, they are counted and warned of,
as are steps that are mostly truncated.

One rank here; two ranks: faults/test_nonfinite_runs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainer import accumulate, conf_of, num_tokens, objective_for, passes_in, some_leaves
from small_trainer import trainer_of as trainer_for
from test_checkpoint import bits_of

from mesh.config.sections import LogConf
from mesh.rl.losses import Loss, clipped_surrogate
from mesh.rl.objective import objective_of
from mesh.rl.packing import Leaf
from mesh.roles.trainer import Trainer
from mesh.runs.metrics import MetricsLogger

WORDS = ["trainer.warmup_steps=9", "trainer.weight_decay=0.1"]
UNCLIPPED = ["clip_low=0.999", "clip_high=1e6"]  # a clipped token has no gradient anyway


def trainer_of(*words: str) -> Trainer:
    return trainer_for(conf_of(*WORDS, *words))


def step(trainer: Trainer, share: Sequence[Leaf], *words: str) -> dict[str, float]:
    accumulate(trainer, passes_in(share), objective_for(conf_of(*WORDS, *words)))
    return trainer.update(2.0, num_tokens(share))


def equal_share() -> list[Leaf]:
    """Leaves of groups whose rewards are all equal."""
    return [replace(leaf, advantages=(0.0,) * len(leaf.rollouts)) for leaf in some_leaves()]


def assert_equal_bits(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert len(mine) > 60 and mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(torch.int32), theirs[name].view(torch.int32)), name


@pytest.mark.parametrize("share", [equal_share(), []], ids=["equal", "dropped"])
@pytest.mark.parametrize("words", [[], ["on_nonfinite=skip"]], ids=["stop", "skip"])
def test_a_step_without_signal_changes_nothing_but_the_time(solo_mesh, share, words):
    """Against a run that has the same steps without this one: weights, moments, bias correction.
    Weights have moments by then, and weight decay; the learning rate warms up by steps."""
    trainer, other = trainer_of(*words), trainer_of(*words)
    assert step(trainer, some_leaves()) == step(other, some_leaves())
    before = bits_of(trainer)
    assert any(moment.any() for name, moment in before.items() if name.startswith("exp_avg/"))
    for count in (1, 2, 3):
        metrics = step(trainer, share)
        assert (metrics["grad_norm"], metrics["steps_without_signal"]) == (0, count)
        assert metrics["tokens/trained"] == num_tokens(share)
        assert all(value == value for value in metrics.values()), "a metric is NaN"
    assert metrics.get("skipped", 0) == 0 and metrics["lr"] == pytest.approx(1e-3 * 4 / 9)
    assert_equal_bits(bits_of(trainer), before)
    assert (trainer.steps, trainer.updates) == (4, 1)
    other.steps += 3
    for _ in range(2):
        mine, theirs = step(trainer, some_leaves()), step(other, some_leaves())
        assert mine == theirs | {"steps_without_signal": 3.0}
        assert_equal_bits(bits_of(trainer), bits_of(other))


def share_with(advantages_R: Sequence[float]) -> list[Leaf]:
    """Leaves of these advantages, in the order of the rollouts."""
    left = iter(advantages_R)
    return [
        replace(leaf, advantages=tuple(next(left) for _ in leaf.rollouts)) for leaf in some_leaves()
    ]


def by_hand(rewards_PG: torch.Tensor) -> torch.Tensor:
    """An advantage function of a user."""
    mean_PG, deviation_PG = (f(rewards_PG, 1, keepdim=True) for f in (torch.mean, torch.std))
    return (rewards_PG - mean_PG) / (deviation_PG + 1e-6)


@pytest.mark.parametrize("advantage", ["std", "centred", by_hand])
def test_rewards_that_are_equal_up_to_rounding_move_no_weight(solo_mesh, advantage):
    """After three real steps, five of 0.7 + 0.2 + 0.1 against 1: the steps before gave moments, and
    without them AdamW makes as large an update of the rounding as of a reward."""
    objective = objective_of(Loss(clipped_surrogate, advantage))
    near = 0.7 + 0.2 + 0.1
    trainer = trainer_of()
    for rewards in ([[0.0, 1.0], [1.0, 0.0]], [[near, 1.0], [1.0, near]]):
        before = bits_of(trainer)
        advantages_PG = objective.advantages(torch.tensor(rewards, dtype=torch.float64))
        share = share_with(advantages_PG.flatten().tolist())
        num = 3 if rewards[0][0] == 0 else 5
        metrics = [step(trainer, share, *UNCLIPPED) for _ in range(num)]
    assert near < 1 and [m["steps_without_signal"] for m in metrics] == [1, 2, 3, 4, 5]
    assert_equal_bits(bits_of(trainer), before)
    assert trainer.updates == 3


@pytest.mark.parametrize("value", [1e-40, 1.4e-45])
def test_the_smallest_gradient_is_a_signal(solo_mesh, value):
    """Its square is 0 in float32."""
    trainer = trainer_of()
    step(trainer, some_leaves())
    before = bits_of(trainer)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.to_local().view(-1)[3] = value
    metrics = trainer.update(1.0, 0)
    assert metrics["grad_norm"] == pytest.approx(value, rel=0.1) and trainer.updates == 2
    assert metrics["steps_without_signal"] == 0
    after = bits_of(trainer)
    assert any(not torch.equal(after[name], before[name]) for name in before)


QUIET = LogConf(tensorboard=False)
NO_SIGNAL = {"grad_norm": 0.0, "equal_groups": 1.0, "tokens/trained": 40.0}
SIGNAL = NO_SIGNAL | {"grad_norm": 1e-30, "equal_groups": 0.5}


def warnings_of(path: Path, capsys, steps: Sequence[dict[str, float]], first: int = 0) -> list[str]:
    """The warnings that a run prints whose steps have these metrics."""
    with MetricsLogger(path, QUIET, 0, 99, first=first) as logger:
        for number, metrics in enumerate(steps, start=first + 1):
            logger.log(number, metrics)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


def test_several_in_a_row_are_warned_about_once_a_streak(tmp_path, capsys):
    steps = [NO_SIGNAL] * 2 + [SIGNAL] + [NO_SIGNAL] * 5 + [SIGNAL] + [NO_SIGNAL] * 3
    found = warnings_of(tmp_path, capsys, steps)
    assert [line.partition(", had no signal")[0] for line in found] == [
        "warning: 3 steps in a row, up to step 6", "warning: 3 steps in a row, up to step 12",
    ]  # fmt: skip
    assert "all rewards of a group are equal, in every group; use prompts" in found[0]
    assert "larger group_size, or a higher generator.temperature" in found[0]


def test_the_warning_says_why(tmp_path, capsys):
    nothing = NO_SIGNAL | {"equal_groups": 0.5, "tokens/trained": 0.0}
    flat = NO_SIGNAL | {"equal_groups": 0.5}
    found = [warnings_of(tmp_path, capsys, [metrics] * 3) for metrics in (nothing, flat)]
    assert [len(lines) for lines in found] == [1, 1]
    assert "no token entered the loss" in found[0][0]
    assert "the loss has no gradient" in found[1][0]


def test_mostly_truncated_steps_are_warned_about_once_a_streak(tmp_path, capsys):
    cut = [0.5, 0.51, 1.0, 0.5, 0.75]
    steps = [SIGNAL | {"response/truncated": share} for share in cut]
    first, second = warnings_of(tmp_path, capsys, [*steps, SIGNAL])
    assert first.startswith("warning: 51% of the responses of step 2 were truncated")
    assert second.startswith("warning: 75% of the responses of step 5 were truncated")
    for remedy in ("generator.max_new_tokens", "truncated=mask", "truncated_reward"):
        assert remedy in first
