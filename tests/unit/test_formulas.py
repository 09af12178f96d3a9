"""Every loss that ships against its paper's formula, written out on padded float64 tensors, and at
ratio 1 against the others."""

from __future__ import annotations

import pytest
import torch
from loss_batches import Batch, batch_of, gradient_of, loss_of
from torch import Tensor

from mesh.rl.losses import LOSSES, LossTokens, sequence_sums
from mesh.rl.losses.sequences import sequence_means
from mesh.rl.losses.surrogates import (
    cispo_surrogate,
    clipped_surrogate,
    gspo_surrogate,
    rloo_surrogate,
    sapo_surrogate,
)
from mesh.rl.objective import objective_of


def ratios(batch: Batch) -> Tensor:
    return torch.exp(batch.logprobs_BL - batch.old_BL)


def least(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r) A), PPO's eq. 7."""
    bounded = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def by_token(loss_BL: Tensor, batch: Batch) -> Tensor:
    return (loss_BL * batch.mask_BL).sum() / batch.mask_BL.sum()


def by_sequence(loss_BL: Tensor, batch: Batch) -> Tensor:
    return ((loss_BL * batch.mask_BL).sum(1) / batch.lengths_B).mean()


def clipped_BL(batch: Batch, high: float = 0.2) -> Tensor:
    return least(ratios(batch), batch.advantages_B[:, None], 0.2, high)


def gspo(batch: Batch) -> Tensor:
    """Eqs. 5 and 7: one differentiable ratio a sequence."""
    log_ratio_BL = (batch.logprobs_BL - batch.old_BL) * batch.mask_BL
    ratio_B = torch.exp(log_ratio_BL.sum(1) / batch.lengths_B)
    return least(ratio_B, batch.advantages_B, 3e-4, 4e-4).mean()


def rloo(batch: Batch) -> Tensor:
    """The clipped ratio of the probabilities of whole sequences."""
    log_ratio_B = ((batch.logprobs_BL - batch.old_BL) * batch.mask_BL).sum(1)
    return least(torch.exp(log_ratio_B), batch.advantages_B, 0.2, 0.2).mean()


def cispo(batch: Batch) -> Tensor:
    weights_BL = torch.minimum(ratios(batch), torch.tensor(5.0)).detach()
    return by_token(-weights_BL * batch.advantages_B[:, None] * batch.logprobs_BL, batch)


def sapo(batch: Batch) -> Tensor:
    tau_B = torch.tensor([1.0 if a > 0 else 1.05 for a in batch.advantages_B], dtype=torch.float64)
    gate_BL = 4 / tau_B[:, None] / (1 + torch.exp(-tau_B[:, None] * (ratios(batch) - 1)))
    return by_sequence(-gate_BL * batch.advantages_B[:, None], batch)


FORMULAS = {
    "grpo": lambda batch: by_sequence(clipped_BL(batch), batch),
    "dr_grpo": lambda batch: (clipped_BL(batch) * batch.mask_BL).sum() / (6 * 16),
    "bnpo": lambda batch: by_token(clipped_BL(batch), batch),
    "dapo": lambda batch: by_token(clipped_BL(batch, 0.28), batch),
    "rloo": rloo,
    "reinforce_pp": lambda batch: by_token(clipped_BL(batch), batch),
    "reinforce_pp_baseline": lambda batch: by_token(clipped_BL(batch), batch),
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "max_rl": lambda batch: by_token(clipped_BL(batch), batch),
}


def test_every_loss_has_its_formula_here():
    assert set(FORMULAS) == {name for name in LOSSES if not LOSSES[name].teacher_coef}


@pytest.mark.parametrize("spread", [0.0, 2e-3, 0.5, 2.5])
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_those_of_the_paper(name, spread):
    """From ratios of 1 to such that most tokens and sequences are clipped."""
    batch = batch_of(spread)
    ours = loss_of(objective_of(LOSSES[name], longest_response=16), batch)
    theirs = FORMULAS[name](batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    expected_BL = gradient_of(theirs, batch)
    torch.testing.assert_close(gradient_of(ours, batch), expected_BL, rtol=1e-11, atol=1e-14)


def test_the_spreads_above_clip_some_and_not_all():
    for name, spread, low, high in (
        ("grpo", 0.5, 2, 20), ("gspo", 2e-3, 1, 23), ("rloo", 0.5, 1, 23), ("cispo", 2.5, 1, 12),
    ):  # fmt: skip
        clipped_T = objective_of(LOSSES[name])(batch_of(spread).packed()).clipped_T
        assert low <= int(clipped_T.sum()) <= high, name
    assert not objective_of(LOSSES["sapo"])(batch_of(2.5).packed()).clipped_T.any()


def test_at_ratio_1_grpo_gspo_and_sapo_have_one_gradient_and_so_have_cispo_and_dapo():
    """To the bit, but for SAPO's 4 / tau * tau / 4; and with the same value, but for CISPO's."""
    batch = batch_of(0.0, dtype=torch.float32)
    gradients = {name: gradient_of(loss_of(objective_of(LOSSES[name]), batch), batch)
                 for name in ("grpo", "gspo", "sapo", "cispo", "dapo", "bnpo")}  # fmt: skip
    assert gradients["grpo"].abs().sum() > 0.5
    assert torch.equal(gradients["gspo"], gradients["grpo"])
    torch.testing.assert_close(gradients["sapo"], gradients["grpo"], rtol=3e-7, atol=0)
    assert torch.equal(gradients["cispo"], gradients["dapo"])
    assert torch.equal(gradients["bnpo"], gradients["dapo"])
    assert not torch.allclose(gradients["grpo"], gradients["dapo"])
    away = batch_of(0.5, dtype=torch.float32)
    others = {name: gradient_of(loss_of(objective_of(LOSSES[name]), away), away)
              for name in gradients}  # fmt: skip
    assert not torch.allclose(others["gspo"], others["grpo"])
    assert not torch.allclose(others["sapo"], others["grpo"], rtol=1e-3)
    assert not torch.allclose(others["cispo"], others["dapo"], rtol=1e-3)


def tokens_of(ratios: list[float], advantages: list[float], sequences: list[int]) -> LossTokens:
    old_T = torch.linspace(-2, -1, len(ratios), dtype=torch.float64)
    logprobs_T = (old_T + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    advantages_T = torch.tensor(advantages, dtype=torch.float64)
    return LossTokens(logprobs_T, old_T, advantages_T, torch.tensor(sequences))


def checked(found, tokens: LossTokens, loss, clipped, gradient) -> None:
    """loss_T, clipped_T and the gradient against numbers by hand."""
    torch.testing.assert_close(found.loss_T.detach(), torch.tensor(loss).double())
    assert found.clipped_T.tolist() == clipped
    (gradient_T,) = torch.autograd.grad(found.loss_T.sum(), tokens.logprobs_T)
    torch.testing.assert_close(gradient_T, torch.tensor(gradient).double())


def test_gspo_by_hand():
    """Ratios 4 and 1 have the mean 2; the other sequence the mean 1/2."""
    tokens = tokens_of([4, 1, 0.25, 1, 0.5], [3.0, 3.0, -1.0, -1.0, -1.0], [0, 0, 1, 1, 1])
    found = gspo_surrogate(tokens, clip_low=0.4, clip_high=1.5)
    checked(found, tokens, [-6.0, -6.0, 0.6, 0.6, 0.6], [False, False, True, True, True],
            [-6.0, -6.0, 0.0, 0.0, 0.0])  # fmt: skip


def test_rloo_by_hand():
    """Ratios of sequences 4 (clipped to 1.2 for A > 0), 3 (A < 0: not clipped) and 1/2."""
    tokens = tokens_of([2, 2, 1.5, 2, 0.5], [3.0, 3.0, -1.0, -1.0, 2.0], [0, 0, 2, 2, 5])
    found = rloo_surrogate(tokens)
    checked(found, tokens, [-1.8, -1.8, 1.5, 1.5, -1.0], [True, True, False, False, False],
            [0.0, 0.0, 3.0, 3.0, -1.0])  # fmt: skip


def test_cispo_by_hand():
    tokens = tokens_of([1.0, 8.0, 0.1], [2.0, -1.0, 3.0], [0, 0, 1])
    logprobs = tokens.logprobs_T.tolist()
    checked(cispo_surrogate(tokens, clip_high=1.0), tokens,
            [-2 * logprobs[0], 2 * logprobs[1], -0.3 * logprobs[2]], [False, True, False],
            [-2.0, 2.0, -0.3])  # fmt: skip


def test_sapo_by_hand():
    """sigmoid(0) = 1/2, sigmoid(log 3) = 3/4, whose slope is 3/16 and whose ratio is 1 + log 3."""
    log3 = 1.0986122886681098
    tokens = tokens_of([1.0, 1 + log3, 1 + log3 / 2], [1.0, 1.0, -1.0], [0, 0, 0])
    found = sapo_surrogate(tokens, tau_positive=1.0, tau_negative=2.0)
    slope = 0.75 * (1 + log3), 0.75 * (1 + log3 / 2)
    checked(found, tokens, [-2.0, -3.0, 1.5], [False] * 3, [-1.0, -slope[0], slope[1]])


def test_dual_clip_by_hand():
    """Beyond c = 3 only where A < 0, with the bounds of clipping as before."""
    ratios, advantages = [4.0, 4.0, 2.5, 0.5, 2.75], [-2.0, 2.0, -2.0, -2.0, -2.0]
    tokens = tokens_of(ratios, advantages, [0] * 5)
    checked(clipped_surrogate(tokens, dual_clip=3.0), tokens, [6.0, -2.4, 5.0, 1.6, 5.5],
            [True, True, False, True, False], [0.0, 0.0, 5.0, 0.0, 5.5])  # fmt: skip
    for surrogate in (gspo_surrogate, rloo_surrogate):
        one = tokens_of([4.0], [-2.0], [0])
        checked(surrogate(one, dual_clip=3.0), one, [6.0], [True], [0.0])
        checked(surrogate(one), one, [8.0], [False], [8.0])


def sequences(seed: int, lengths: tuple[int, ...], dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator, dtype=dtype) for n in lengths]


def packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(part) for part in parts])
    return torch.cat(parts), 3 * torch.arange(len(parts)).repeat_interleave(lengths) + 1


def test_sums_over_sequences_by_hand():
    x_T = torch.tensor([1.0, 2, 4, 8, 16, 32])
    sequence_T = torch.tensor([0, 2, 2, 2, 5, 5])
    assert sequence_sums(x_T, sequence_T).tolist() == [1, 14, 14, 14, 48, 48]
    means_T = torch.tensor([1, 14 / 3, 14 / 3, 14 / 3, 24, 24])
    assert torch.equal(sequence_means(x_T, sequence_T), means_T)
    nothing = torch.zeros(0)
    assert sequence_sums(nothing, nothing.long()).tolist() == []
    assert sequence_sums(x_T, torch.zeros(6, dtype=torch.int64)).tolist() == [63.0] * 6


def test_sums_over_sequences_are_those_of_float64():
    parts = sequences(1, (1, 2, 3, 4, 5, 8, 33), torch.float64)
    x_T, sequence_T = packed(parts)
    expected_T = torch.cat([part.sum().expand(len(part)) for part in parts])
    torch.testing.assert_close(sequence_sums(x_T, sequence_T), expected_T, rtol=1e-14, atol=0)


def test_the_bits_of_a_sum_do_not_depend_on_the_pass():
    """Alone, beside others, behind others, in front of others; a plain sum's bits do."""
    parts = [*sequences(3, (1, 7, 64, 129, 300, 5, 31)), torch.tensor([-0.0])]
    alone = [sequence_sums(part, torch.zeros(len(part)).long())[0] for part in parts]
    for order in ((0, 1, 2, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1, 0), (3, 7, 4), (2, 2, 4, 1)):
        x_T, sequence_T = packed([parts[i] for i in order])
        sums_T = sequence_sums(x_T, sequence_T)
        expected_T = torch.cat([alone[i].expand(len(parts[i])) for i in order])
        assert torch.equal(sums_T.view(torch.int32), expected_T.view(torch.int32))
