"""The losses that TRL has too, against its own code on random tensors: value and gradient.

Skipped without trl 1.16, whose private functions are called. TRL's trainers are not built: what
they compute the loss with is given to their function.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from loss_batches import Batch, batch_of, gradient_of, loss_of

from mesh.rl.losses import LOSSES, Importance
from mesh.rl.objective import Objective, objective_of


def trl_version() -> str:
    try:
        return version("trl")
    except PackageNotFoundError:
        return "none"


pytestmark = pytest.mark.skipif(
    not trl_version().startswith("1.16."),
    reason=f"needs trl 1.16 (pip install -e '.[trl]'), found {trl_version()}",
)

LONGEST = 16
ACCELERATOR = SimpleNamespace(
    num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
)


def trl_loss(batch: Batch, loss_type: str, **keys) -> torch.Tensor:
    """The loss of TRL's GRPOTrainer for a batch that is one step."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    settings = {
        "loss_type": loss_type, "importance_sampling_level": "token", "beta": 0.0,
        "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, "weights_BL": None,
    }  # fmt: skip
    keys = settings | keys
    entropies_BL = torch.zeros_like(batch.old_BL)
    trainer = SimpleNamespace(
        **{name: keys[name] for name in settings if name not in ("delta", "weights_BL")},
        args=SimpleNamespace(
            delta=keys["delta"], use_bias_correction_kl=False,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1,
        ),
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR,
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False,
        use_vllm=keys["weights_BL"] is not None, vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs_BL, entropies_BL, None),
    )  # fmt: skip
    nothing = torch.zeros(len(batch.old_BL), 0)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": batch.mask_BL,
        "completion_mask": batch.mask_BL, "advantages": batch.advantages_B,
        "old_per_token_logps": batch.old_BL, "ref_per_token_logps": batch.other_BL,
        "num_items_in_batch": batch.mask_BL.sum(),
        "importance_sampling_ratio": keys["weights_BL"],
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def trl_rloo_loss(batch: Batch) -> torch.Tensor:
    """The loss of TRL's RLOOTrainer."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    nothing = torch.zeros(len(batch.old_BL), 0)
    trainer = SimpleNamespace(
        epsilon_low=0.2, epsilon_high=0.2, model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR, aux_loss_enabled=False, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            batch.logprobs_BL, torch.zeros_like(batch.old_BL), None,
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": batch.mask_BL,
        "completion_mask": batch.mask_BL, "advantages": batch.advantages_B,
        "old_logps": (batch.old_BL * batch.mask_BL).sum(1),
    }  # fmt: skip
    return RLOOTrainer._compute_loss(trainer, None, inputs)


def same(objective: Objective, batch: Batch, theirs: torch.Tensor, rtol: float = 1e-11) -> None:
    ours = loss_of(objective, batch)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-14)
    expected_BL = gradient_of(theirs, batch)
    torch.testing.assert_close(gradient_of(ours, batch), expected_BL, rtol=rtol, atol=1e-14)


THEIRS = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence",
        "epsilon_low": 3e-4, "epsilon_high": 4e-4,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
}  # fmt: skip


@pytest.mark.parametrize("spread", [0.0, 2e-3, 0.5, 2.5])
@pytest.mark.parametrize("name", THEIRS)
def test_a_loss_is_that_of_trl(name, spread):
    batch = batch_of(spread, seed=5)
    objective = objective_of(LOSSES[name], longest_response=LONGEST)
    rtol = 1e-5 if name == "sapo" else 1e-11  # its temperature is 1.05 in float32
    same(objective, batch, trl_loss(batch, **THEIRS[name]), rtol)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.5])
def test_rloo_is_that_of_trl(spread):
    batch = batch_of(spread, seed=6)
    same(objective_of(LOSSES["rloo"]), batch, trl_rloo_loss(batch))


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_the_dual_clip_is_trls_delta(name):
    batch = batch_of(2.5, seed=7)
    objective = objective_of(LOSSES[name], settings={"dual_clip": 2.0})
    same(objective, batch, trl_loss(batch, **THEIRS[name], delta=2.0))


@pytest.mark.parametrize("name", ["grpo", "cispo"])
def test_the_kl_in_the_loss_is_trls_beta(name):
    batch = batch_of(0.5, seed=8)
    objective = objective_of(LOSSES[name], kl_coef=0.1)
    same(objective, batch, trl_loss(batch, **THEIRS[name], beta=0.1))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["tis", "mask"])
def test_importance_weights_are_those_of_trls_vllm_correction(kind, level):
    """Its four modes, as its _generate_and_score_completions has them; the loss multiplies them."""
    batch = batch_of(0.5, seed=9)
    difference_BL = (batch.old_BL - batch.other_BL) * batch.mask_BL
    if level == "sequence":
        difference_BL = difference_BL.sum(1, keepdim=True)
    weights_BL = torch.exp(difference_BL)
    if kind == "tis":
        weights_BL = weights_BL.clamp(min=0.8, max=1.2)
    else:
        weights_BL = weights_BL.masked_fill((weights_BL < 0.8) | (weights_BL > 1.2), 0.0)
    objective = objective_of(LOSSES["grpo"], importance=Importance(kind, level, 0.8, 1.2))
    same(objective, batch, trl_loss(batch, "grpo", weights_BL=weights_BL))
